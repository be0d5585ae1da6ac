"""`blip2 bench`: how fast a model speaks, beside a peer, in one run."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from blip2.cli import options
from blip2.cli.output import note
from blip2.errors import UserError


def bench(
    model: options.Model = "mini",
    peer: Annotated[
        str | None,
        typer.Option(
            help="Folder of a checkpoint that transformers runs beside it; by default the model's own where it is one, "
            "else the same parts one after the other."
        ),
    ] = None,
    peer_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="The peer's; by default as --dtype.")
    ] = None,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    device: options.Device = "auto",
    runs: Annotated[int, typer.Option(min=1, help="Rounds; the medians are told.")] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="Words of each caption.")] = 17,
    batch: Annotated[
        list[int] | None, typer.Option(min=2, max=1024, help="Also so many pictures in one call; may be repeated.")
    ] = None,
    json: options.Json = False,
    out: Annotated[Path | None, typer.Option(help="A folder for bench.json, the table and a plot.")] = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure how fast a model sees, reads and speaks, and what memory it takes, beside a peer, in turns.

    Pictures are new in every round. The ratios say how many times faster than the peer the model is.
    """
    import json as json_format

    from blip2.checkpoints.huggingface import is_checkpoint
    from blip2.cli.models import place_and_dtype
    from blip2.evaluation import speed, speed_report
    from blip2.inference.loading import find_model

    place, own_dtype = place_and_dtype(device, dtype)
    folder = find_model(model)
    ours = speed.Contender("blip2", str(folder), own_dtype, quantize, place)
    if peer is None and not is_checkpoint(folder):
        beside = speed.Contender("plain", str(folder), peer_dtype or own_dtype, None, place)
    else:
        other = folder if peer is None else Path(peer)
        if not is_checkpoint(other):
            raise UserError(f"{other} is no checkpoint of BLIP-2 or InstructBLIP in Hugging Face's layout.")
        beside = speed.Contender("transformers", str(other), peer_dtype or own_dtype, None, place)
    plan = speed.Plan(runs, tokens, tuple(batch or ()))
    found = speed.compare([ours, beside], plan, lambda text: note(text, quiet=quiet))
    if out is not None:
        for path in speed_report.save(out, found):
            note(f"Written: {path}", quiet=quiet)
    print(json_format.dumps(found) if json else speed_report.as_text(found))
