"""`blip2 convert`: a bridge from the original code's format to ours, or back."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from blip2.errors import UserError


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A .pth of LAVIS, or a model folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The model folder, or the .pth, to write.")],
    to: Annotated[Literal["blip2", "lavis"], typer.Option(help="The format to write.")],
    vision: Annotated[
        str | None, typer.Option(help="To blip2: name or folder of the frozen image encoder, which a .pth lacks.")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="To blip2: name or folder of the frozen LLM, if it speaks.")] = None,
    text_init: Annotated[
        str, typer.Option(help="To blip2: name or folder of the BERT whose tokenizer it has.")
    ] = "bert-base-uncased",
    image_size: Annotated[
        int, typer.Option(min=1, help="To blip2: side of the pictures; 364 for LAVIS's fine-tuned models.")
    ] = 224,
    part: Annotated[
        Literal["stage1", "generation"] | None, typer.Option(help="To lavis: which part, where there are two.")
    ] = None,
) -> None:
    """Convert a trained bridge between LAVIS's format (.pth) and ours; no weight changes by a bit.

    The frozen image encoder and LLM are named, not copied. Hugging Face's checkpoints need no conversion: give them as
    --model.
    """
    from blip2.checkpoints.convert import FrozenNames, from_lavis, to_lavis

    if to == "lavis":
        to_lavis(source, target, part)
    elif vision is None:
        raise UserError(
            "A .pth does not name its image encoder. Add it: --vision NAME (Salesforce/blip2-opt-2.7b has it)."
        )
    else:
        from_lavis(source, target, FrozenNames(vision, llm, text_init, image_size))
    print(target)
