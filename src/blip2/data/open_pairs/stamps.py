"""Tux Paint's stamps: photographic cut-outs and drawings, each with one line of English and of other languages."""

import io
from collections.abc import Iterator
from pathlib import PurePosixPath

import resvg_py
from PIL import Image

from blip2 import registry
from blip2.data.open_pairs.picture import Picture, concept_of, cropped

LOCALES = {"zh": "zh_CN", "pt": "pt_BR"}  # where a language has none of its own name


def read_stamps(language: str = "en") -> Iterator[Picture]:
    """All stamps but letters, digits and other symbols, that have a line in the language.

    What a stamp shows is told by the English line in any case, so that splits are the same in all languages.
    """
    files = {
        name.removeprefix("usr/share/tuxpaint/stamps/"): data
        for name, data in registry.deb_members("stamps")
        if "/stamps/" in name and "/symbols/" not in name and name.endswith((".png", ".svg", ".txt"))
    }
    for name in sorted(files):
        if name.endswith(".txt") or (name.endswith(".svg") and name.replace(".svg", ".png") in files):
            continue
        words = files.get(str(PurePosixPath(name).with_suffix(".txt")))
        lines = words.decode("utf-8", "replace").splitlines() if words else [""]
        english, caption = _plain(lines[0]), _plain(lines[0] if language == "en" else _translated(lines, language))
        decoded = _decoded(name, files[name])
        image = cropped(decoded) if decoded is not None else None
        if caption and image is not None:
            if language == "en":
                caption = caption[0].lower() + caption[1:]
            style = "drawn" if name.endswith(".svg") or "cartoon" in name else "photo"
            yield Picture(image, caption, concept_of(english), "stamps", f"stamp-{style}", "GPL-2.0")


def _plain(line: str) -> str:
    """A line without what ends a sentence."""
    return line.strip().rstrip(".!。！ ")


def _translated(lines: list[str], language: str) -> str:
    """The line in a language, "" where there is none: `zh_CN.utf8=青蛙。`."""
    begin = f"{LOCALES.get(language, language)}.utf8="
    return next((line.removeprefix(begin) for line in lines if line.startswith(begin)), "")


def _decoded(name: str, data: bytes) -> Image.Image | None:
    """The picture, or None for one of the few SVGs that state no size."""
    if name.endswith(".svg"):
        try:
            data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode("utf-8", "replace"), width=320))
        except ValueError:
            return None
    return Image.open(io.BytesIO(data))
