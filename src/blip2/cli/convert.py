"""`blip2 convert`: a bridge from one of three formats to another."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from blip2.errors import UserError


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A .pth of LAVIS, a model folder (ours or Hugging Face's), a model's name."),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder, or the .pth, to write.")],
    to: Annotated[Literal["blip2", "hf", "lavis"], typer.Option(help="The format to write.")],
    vision: Annotated[
        str | None, typer.Option(help="Of a .pth: name or folder of the frozen image encoder, which it lacks.")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="Of a .pth: name or folder of the frozen LLM, if it speaks.")] = None,
    text_init: Annotated[
        str, typer.Option(help="Of a .pth: name or folder of the BERT whose tokenizer it has.")
    ] = "bert-base-uncased",
    image_size: Annotated[
        int, typer.Option(min=1, help="Of a .pth with a frozen encoder: side of the pictures.")
    ] = 224,
    part: Annotated[
        Literal["stage1", "generation"] | None, typer.Option(help="Which part of a model that has two.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(help="To hf: of the frozen parts, which are stored too."),
    ] = "float32",
) -> None:
    """Convert a trained bridge between LAVIS's format (.pth), Hugging Face's and ours; no weight changes by a bit.

    Hugging Face's layout holds the frozen image encoder and LLM as well; the others name them. Its checkpoints need no
    conversion to be used: give them as --model.
    """
    import torch

    from blip2.checkpoints import convert as formats
    from blip2.checkpoints.huggingface import CONFIG_FILE
    from blip2.checkpoints.native import SETTINGS_FILE
    from blip2.checkpoints.placing import checked_place
    from blip2.inference.loading import find_model

    path = Path(source) if Path(source).exists() or source.endswith(".pth") else find_model(source)
    if target.exists() and path.resolve() == target.resolve():
        raise UserError(f"{target} would be written over what it is read from. Give another DST.")
    place = target if to == "lavis" else checked_place(target, CONFIG_FILE if to == "hf" else SETTINGS_FILE)
    bridge = formats.read(path, source, formats.FrozenNames(vision, llm, text_init, image_size), part)
    if to == "lavis":
        formats.write_lavis(bridge, place)
    elif to == "hf":
        formats.write_hugging_face(bridge, place, getattr(torch, dtype))
    else:
        formats.write_folder(bridge, place)
    print(target)
