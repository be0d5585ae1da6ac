"""`blip2 export`: finished runs -> a model folder."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    stage1: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN[=WEIGHT]",
            help="A run of stage 1: its name, folder or checkpoint. Given several times, the runs are averaged.",
        ),
    ] = None,
    generation: Annotated[
        list[str] | None, typer.Option(metavar="RUN[=WEIGHT]", help="The same of stage 2 or instruct.")
    ] = None,
    caption_best_of: Annotated[
        int,
        typer.Option(min=1, max=64, help="Captions made for each picture, of which stage 1 chooses one; needs both."),
    ] = 1,
    match_weight: Annotated[
        float, typer.Option(min=0, help="Weight of image-text matching beside contrast where both order candidates.")
    ] = 1.0,
    name: Annotated[str | None, typer.Option(help="Name of the model; the folder's if not given.")] = None,
) -> None:
    """Write what runs have learnt as a model folder, which every command takes as --model.

    Runs of one part that began from one another can be averaged, which often does better than each alone:
    --stage1 first=0.3 --stage1 second=0.7
    """
    from blip2.training.export import export as write
    from blip2.training.starting import run_folder

    runs = {
        part: {run_folder(run): weight for run, weight in map(_run_and_weight, given or [])}
        for part, given in (("stage1", stage1), ("generation", generation))
    }
    settings = write(
        out,
        name or out.name,
        stage1=runs["stage1"],
        generation=runs["generation"],
        caption_best_of=caption_best_of,
        match_weight=match_weight,
    )
    for part in settings.parts.values():
        print(out / part.file)


def _run_and_weight(given: str) -> tuple[str, float]:
    """`run=0.7` -> the run and its weight in the average; 1 where none is named."""
    run, _, weight = given.rpartition("=")
    try:
        return (run, float(weight)) if run else (given, 1.0)
    except ValueError:
        return given, 1.0  # a folder with = in its name
