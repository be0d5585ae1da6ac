"""blip2 evaluate: the table of what a model reaches on the open set, beside its baselines."""

import json as json_format
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blip2.cli import options
from blip2.cli.models import captioning_parts, open_model
from blip2.cli.output import note
from blip2.errors import MissingPart

if TYPE_CHECKING:
    from blip2.inference.blip2 import Blip2


def evaluate(
    model: options.Model = "mini",
    data: Annotated[Path | None, typer.Option(help="Folder of the open set; the one built here if not given.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="retrieval, captions, vqa, easy_vqa or baselines; repeatable. All that the model can do."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pictures or questions of a split at most; 0 takes all. By default 1,000 captions and questions.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json, table.md and plots.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object of fractions instead.")] = False,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure a model on pictures and scenes that training kept away from it, beside chance, blind and simple methods.

    Every figure is in percent; with --json a fraction. What a split holds beyond --limit is left out evenly.
    """
    from blip2 import paths
    from blip2.data.shards import read_manifest
    from blip2.evaluation import report
    from blip2.evaluation.benchmarks import open_pairs
    from blip2.evaluation.benchmarks.open_pairs_table import PLOTS, ROWS

    folder = data or paths.data_dir() / "open-pairs"
    read_manifest(folder)  # before the model, which takes longer to load
    tasks = _possible_tasks(model, task, quiet=quiet)
    begin = time.perf_counter()
    opened = _open(model, tasks, device=device, dtype=dtype, quantize=quantize, quiet=quiet)
    results = open_pairs.run(
        opened, folder, tasks, limit=limit, batch_size=batch_size, say=lambda text: note(text, quiet=quiet)
    )
    seconds = round(time.perf_counter() - begin)
    metrics = {name: round(value, 5) for name, value in results.metrics.items()}
    cells = report.table(ROWS, metrics, results.counts)
    if out is not None:
        about = {"model": model, "data": folder.name, "limit": limit, "seconds": seconds}
        for path in report.save(out, cells, metrics, results.counts, PLOTS, about):
            note(f"Written: {path}", quiet=quiet)
        if not report.can_draw():
            note("No plots: drawing needs matplotlib (pip install 'blip2[train]').", quiet=quiet)
    print(json_format.dumps(metrics) if json else report.as_text(cells))
    part_of = [prefix for prefix, (used, total) in results.counts.items() if used < total]
    if part_of:
        note(f"Only a part was used of {', '.join(part_of)}; --limit 0 takes all.", quiet=quiet)
    note(f"{seconds} s", quiet=quiet)


def _possible_tasks(model: str, asked: list[str] | None, *, quiet: bool) -> list[str]:
    """The tasks asked for, else all that the model has the parts for."""
    from blip2.checkpoints.native import PARTS
    from blip2.evaluation.benchmarks.open_pairs import TASKS
    from blip2.inference.loading import find_model, read_settings

    parts = read_settings(find_model(model)).parts
    lacking = {name: part for name, part in TASKS.items() if part is not None and part not in parts}
    for name in asked or ():
        if name in lacking:
            raise MissingPart(f"The model {model!r} lacks {PARTS[lacking[name]]}, which the task {name} needs.")
    if asked:
        return list(dict.fromkeys(asked))
    if lacking:
        note(f"{model} lacks a part, so these are left out: {', '.join(lacking)}.", quiet=quiet)
    return [name for name in TASKS if name not in lacking]


def _open(model: str, tasks: list[str], **options: Any) -> "Blip2":
    """The model with the parts that the tasks need."""
    from blip2.evaluation.benchmarks.open_pairs import TASKS

    parts = {part for name, part in TASKS.items() if part is not None and name in tasks}
    if "captions" in tasks:
        parts |= {*captioning_parts(model)}
    return open_model(model, *(sorted(parts) or ["stage1"]), **options)
