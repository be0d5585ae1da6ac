"""blip2 embed: pictures and texts as vectors, in one .npz file."""

import glob
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from blip2.cli import inputs as pictures
from blip2.cli import options
from blip2.cli.inputs import PICTURE_SUFFIXES, Input
from blip2.cli.models import open_model
from blip2.cli.output import check_folder, note, progress_bar, whole_file
from blip2.errors import BadImage, MissingFile, UserError


def embed(
    items: Annotated[list[str], typer.Argument(metavar="FILE|FOLDER|GLOB|TEXT...", help="Pictures and texts, mixed.")],
    out: Annotated[Path, typer.Option("--out", help="The .npz file to write.")],
    model: options.Model = "mini",
    batch_size: options.BatchSize = 16,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    quiet: options.Quiet = False,
) -> None:
    """Write unit vectors of pictures and texts to a NumPy file.

    It holds image_paths (B), image_embeds (B, queries, width), texts (C) and text_embeds (C, width). The similarity of
    a text with a picture is the largest dot product over the picture's queries.
    """
    _check_out(out)
    named, texts = _part(items)

    @cache  # opened once there is something to embed
    def opened() -> Any:
        return open_model(model, "stage1", device=device, dtype=dtype, quantize=quantize, quiet=quiet)

    paths, embeds, num_bad = _embed_images(opened, pictures.expand(named), batch_size, quiet)
    if not paths and not texts:
        raise typer.Exit(2)
    import numpy as np

    arrays: dict[str, Any] = {}
    if paths:
        arrays |= {"image_paths": np.asarray(paths), "image_embeds": np.concatenate(embeds)}
    if texts:
        arrays |= {"texts": np.asarray(texts), "text_embeds": opened().embed_texts(texts)}
    _write(out, arrays)
    note(f"{out}: {len(paths)} pictures, {len(texts)} texts", quiet=quiet)
    raise typer.Exit(1 if num_bad else 0)


def _check_out(out: Path) -> None:
    if out.suffix != ".npz":
        raise UserError(f"{out} does not end in .npz, the format that is written. Name it {out.with_suffix('.npz')}.")
    check_folder(out)


def _part(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which items name pictures, and which are texts. What looks like a picture's name or a path is no text, even if
    misspelt."""
    named = [item for item in items if _names_pictures(item)]
    return named, [item for item in items if not _names_pictures(item)]


def _names_pictures(item: str) -> bool:
    if item == "-" or item.lower().endswith(PICTURE_SUFFIXES) or Path(item).exists():
        return True
    is_path = os.sep in item and not any(letter.isspace() for letter in item)
    return is_path or (glob.has_magic(item) and bool(glob.glob(item, recursive=True)))


def _embed_images(
    opened: Callable[[], Any], found: Sequence[Input], batch_size: int, quiet: bool
) -> tuple[list[str], list[Any], int]:
    """The paths of the pictures that can be read, their vectors by batches, and how many cannot; those are listed.

    No more than a batch of pictures is in memory.
    """
    paths, embeds, num_bad = [], [], 0
    waiting: list[Any] = []
    with progress_bar(len(found), quiet=quiet) as bar:
        for number, item in enumerate(found, start=1):
            try:
                waiting.append(item.load())
                paths.append(item.name)
            except (BadImage, MissingFile) as error:
                note(f"blip2: {error}")
                num_bad += 1
            if waiting and (len(waiting) == batch_size or number == len(found)):
                embeds.append(opened().embed_images(waiting))
                waiting = []
            bar.update(1)
    return paths, embeds, num_bad


def _write(out: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    with whole_file(out) as beside, beside.open("wb") as file:
        np.savez(file, **arrays)
