"""Where a model folder is put: whole or not at all, and nothing else that is there goes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from blip2.errors import UserError


def checked_place(folder: Path | str, mark: str) -> Path:
    """Where a folder that is named so lies, links followed.

    Args:
        folder: to be written.
        mark: the file by which such a folder is known.

    Raises:
        UserError: a file is there, or a folder that holds other things; or it is the working folder, or above it.
    """
    place = Path(folder).resolve()
    if Path.cwd().is_relative_to(place):
        raise UserError(f"{folder} is the folder you are in, or above it, and would be replaced. Name another.")
    if place.exists() and not place.is_dir():
        raise UserError(f"{folder} is a file, and a folder is to be written. Give another name.")
    if place.is_dir() and not (place / mark).is_file() and any(place.iterdir()):
        raise UserError(
            f"The folder {folder} holds other things and no model ({mark}). Name a new folder, an empty one, or that "
            "of a model, which is replaced."
        )
    return place


def beside(place: Path) -> Path:
    """An empty folder beside the place, to be written and then put there."""
    path = place.with_name(f".{place.name}.writing-{os.getpid()}")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def put(new: Path, place: Path, is_ours: Callable[[str], bool]) -> None:
    """Puts the folder `new` at `place`, so that a reader finds the old one or the new one, whole.

    Its files get the rights that new files have (umask), for safetensors leaves what it writes to its owner alone.

    Args:
        new: beside the place.
        place: as `checked_place` gives it.
        is_ours: of a name in the old folder: whether it goes with that one. All else is moved into the new one.
    """
    for path in new.rglob("*"):
        if path.is_file():
            path.chmod(new.stat().st_mode & 0o666)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = place.with_name(f".{place.name}.old-{os.getpid()}")
    if place.exists():
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    for path in old.iterdir() if old.is_dir() else ():
        if not (is_ours(path.name) or (place / path.name).exists()):
            path.rename(place / path.name)
    shutil.rmtree(old, ignore_errors=True)
