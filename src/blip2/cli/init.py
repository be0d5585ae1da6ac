"""`blip2 init`: an untrained bridge between an image encoder and an LLM."""

from pathlib import Path
from typing import Annotated

import typer

from blip2.cli.output import note


def init(
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    vision: Annotated[str, typer.Option(help="Frozen image encoder: a name, a folder, a name on the hub.")],
    llm: Annotated[str | None, typer.Option(help="Frozen LLM, likewise; without one the model only compares.")] = None,
    qformer: Annotated[
        str, typer.Option(metavar="base|mini|FOLDER", help="Its size and start: BERT-base, MiniLM, another BERT.")
    ] = "base",
    queries: Annotated[int | None, typer.Option(min=1, max=1024, help="Learned queries; 32, of mini 16.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights that start at random.")] = 0,
) -> None:
    """Make an untrained bridge between any image encoder and any LLM, with the recipes to train it.

    The recipes train on the open training set (`blip2 data build`); change their data section for your own.
    """
    from blip2.training.untrained import init as make

    for path in make(out, vision=vision, language=llm, qformer=qformer, num_query_tokens=queries, seed=seed):
        print(path)
    note(f"Train it: blip2 train {out / 'stage1.yaml'}")
