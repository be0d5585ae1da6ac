"""What was laid out of a quantised part, kept for the next time: mapping it takes no time, laying it out a second for
each gigabyte and more.

    BLIP2_HOME/laid-out/KEY/    model.tflite, laid-out   as a `ModelFile` and LiteRT wrote them
                                source.json              the file of weights it was made of, its size and time

The key stands for that file, this code, LiteRT's version and what the processor can. Processes share one copy in
memory. A place is filled whole or not at all; places whose weights are gone or have changed go when another is filled.
"""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blip2 import paths

WORTH = 64 << 20  # bytes of weights; fewer are laid out before one notices
ROOM = 4  # times the weights' bytes must be free: the model and what was laid out of it, and as much is left
MODEL, LAID_OUT, SOURCE = "model.tflite", "laid-out", "source.json"


def place_for(weights: Path) -> Path | None:
    """The folder for what is laid out of a file of weights, there already or not; None where it is not worth it."""
    told = _told(weights)
    if told is None or told["bytes"] < WORTH:
        return None
    known = {"code": _code(), "litert": version("ai-edge-litert"), "processor": torch.cpu.get_capabilities()}
    key = hashlib.sha256(json.dumps(told | known, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return paths.home() / "laid-out" / key


def is_filled(place: Path) -> bool:
    """Whether all is there, and may be read."""
    return all(os.access(place / name, os.R_OK) for name in (MODEL, LAID_OUT, SOURCE))


def begun(place: Path, weights: Path) -> Path | None:
    """An empty folder to write to, beside the place; None where there is no room or no right to."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place.parent)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.writing-{os.getpid()}-", dir=place.parent))
        folder.chmod(place.parent.stat().st_mode & 0o777)
        if shutil.disk_usage(folder).free > ROOM * weights.stat().st_size:
            return folder
        folder.rmdir()
    return None


def put(folder: Path, place: Path, weights: Path) -> Path:
    """Puts a folder that was written at its place, once it is on disk.

    Returns:
        Where its files are now; where that cannot be, the folder is gone and its files are there for who has them open.
    """
    try:
        (folder / SOURCE).write_text(json.dumps(_told(weights)) + "\n", encoding="utf-8")
        for name in (MODEL, LAID_OUT, SOURCE):
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        folder.rename(place)
    except OSError:  # another process was first, or the disk is full
        shutil.rmtree(folder, ignore_errors=True)
        return folder
    return place


def _told(weights: Path) -> dict[str, Any] | None:
    try:
        stat = weights.stat()
    except OSError:
        return None
    return {"path": str(weights.resolve()), "bytes": stat.st_size, "changed": stat.st_mtime_ns}


def _sweep(folder: Path) -> None:
    """Removes what was laid out of weights that are gone or have changed, and what a process left that was ended."""
    for path in folder.glob("*/" + SOURCE):
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_text(encoding="utf-8"))
            if _told(Path(told["path"])) != told:
                shutil.rmtree(path.parent, ignore_errors=True)
    for path in folder.glob(".*.writing-*"):
        process = path.name.split("-")[-2]
        if process.isdecimal() and not _lives(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@cache
def _code() -> str:
    """Of the modules that decide what is laid out."""
    found = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.glob("*.py"), Path(__file__).parents[1] / "rotation.py"]):
        found.update(path.read_bytes())
    return found.hexdigest()
