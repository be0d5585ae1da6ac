"""`blip2 export`: finished runs -> a model folder."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    stage1: Annotated[str | None, typer.Option(help="A run of stage 1: its name, folder or checkpoint.")] = None,
    generation: Annotated[str | None, typer.Option(help="A run of stage 2 or instruct.")] = None,
    caption_best_of: Annotated[
        int,
        typer.Option(min=1, max=64, help="Captions made for each picture, of which stage 1 chooses one; needs both."),
    ] = 1,
    name: Annotated[str | None, typer.Option(help="Name of the model; the folder's if not given.")] = None,
) -> None:
    """Write what runs have learnt as a model folder, which every command takes as --model."""
    from blip2.training.build import run_folder
    from blip2.training.export import export as write

    paths = {part: run_folder(run) if run else None for part, run in (("stage1", stage1), ("generation", generation))}
    settings = write(
        out,
        name or out.name,
        stage1=paths["stage1"],
        generation=paths["generation"],
        caption_best_of=caption_best_of,
    )
    for part in settings.parts.values():
        print(out / part.file)
