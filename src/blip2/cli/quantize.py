"""`blip2 quantize`: a model with few bits a weight, written to disk."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from blip2.cli import options
from blip2.cli.output import note
from blip2.errors import UserError


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model: its name, or its folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    to: Annotated[Literal["int8", "int4"], typer.Option(help="Bits of the language model's weights.")],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale in int4: 32 (if not given), 64, 128 or 256. Larger: smaller and faster."
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a model with int8 or int4 weights: a fraction of the memory, faster on a CPU, its answers nearly the same.

    The image encoder gets int8 in either case; the bridge stays as it is. The folder holds what it needs and serves as
    --model. docs/quantization.md has what it costs in accuracy.
    """
    from blip2.checkpoints.native import SETTINGS_FILE
    from blip2.checkpoints.placing import checked_place
    from blip2.checkpoints.quantize import write
    from blip2.inference.loading import find_model
    from blip2.model.quantized import GROUP_SIZE, GROUP_SIZES

    if group_size is not None and to == "int8":
        raise UserError("--group-size is for int4: eight bits need one scale a row. Leave it out.")
    if group_size not in (None, *GROUP_SIZES):
        raise UserError(f"--group-size is {group_size}; it must be 32, 64, 128 or 256.")
    folder = find_model(source)
    if target.exists() and folder.resolve() == target.resolve():
        raise UserError(f"{target} would be written over what it is read from. Give another DST.")
    place = checked_place(target, SETTINGS_FILE)
    note(f"Rounding {source} to {to}; a few billion weights take a minute or two.", quiet=quiet)
    write(folder, source, place, to, group_size=group_size or GROUP_SIZE)
    print(target)
