"""What people name on the command line -> the pictures meant: files, folders, globs, standard input."""

import codecs
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.errors import BadImage, UserError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")
JPEG = b"\xff\xd8"  # begins the only kind of picture that may hold no zero


@dataclass(frozen=True)
class Input:
    """One picture to be.

    Attributes:
        name: its path as it is shown in results.
        data: the bytes, where it came through standard input.
        is_lone: named by itself, not found in a folder, a pattern or a list.
    """

    name: str
    data: bytes | None = None
    is_lone: bool = False

    def load(self) -> Any:
        """The PIL image. Raises BadImage or MissingFile, naming the path."""
        from blip2.preprocessing.images import load_image

        if self.data is not None:
            return load_image(self.data, name="the picture on standard input")
        if Path(self.name).is_dir():
            raise BadImage(f"The folder {self.name} holds no picture ({', '.join(PICTURE_SUFFIXES)}).")
        return load_image(self.name)


def expand(arguments: Sequence[str]) -> list[Input]:
    """All pictures that the arguments name, in their order; folders and patterns sorted by path.

    A path that leads nowhere is kept: loading it tells what is wrong, and the others are still answered.
    """
    return [found for argument in arguments for found in _expand_one(argument)]


def _expand_one(argument: str) -> Iterator[Input]:
    if not argument:
        raise UserError("One of the paths is empty. Name a picture, or . for all below this folder.")
    if argument == "-":
        yield from _from_standard_input(sys.stdin.buffer.read())
    elif Path(argument).is_dir():
        inside = sorted(path for path in Path(argument).rglob("*") if _is_picture_file(path))
        yield from (Input(str(path)) for path in inside or [Path(argument)])
    elif glob.has_magic(argument) and not Path(argument).exists():
        matches = sorted(path for path in glob.glob(argument, recursive=True) if Path(path).is_file())
        yield from (Input(path) for path in matches or [argument])
    else:
        yield Input(argument, is_lone=True)


def _is_picture_file(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _from_standard_input(data: bytes) -> Iterator[Input]:
    """Paths, one a line, where the bytes are text; else they are a picture. Names need not be UTF-8."""
    if not data.strip():
        raise UserError("Standard input is empty. Pipe a picture into it, or paths, one a line.")
    if b"\0" in data or data.startswith(JPEG):
        yield Input("-", data, is_lone=True)
    else:
        lines = data.removeprefix(codecs.BOM_UTF8).splitlines()
        yield from (Input(os.fsdecode(line)) for line in lines if line.strip())
