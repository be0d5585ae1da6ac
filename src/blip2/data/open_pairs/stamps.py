"""Tux Paint's stamps: photographic cut-outs and drawings, each with one line of English."""

import io
from collections.abc import Iterator
from pathlib import PurePosixPath

import resvg_py
from PIL import Image

from blip2 import registry
from blip2.data.open_pairs.picture import Picture, concept_of, cropped


def read_stamps() -> Iterator[Picture]:
    """All stamps but letters, digits and other symbols."""
    files = {
        name.removeprefix("usr/share/tuxpaint/stamps/"): data
        for name, data in registry.deb_members("stamps")
        if "/stamps/" in name and "/symbols/" not in name and name.endswith((".png", ".svg", ".txt"))
    }
    for name in sorted(files):
        if name.endswith(".txt") or (name.endswith(".svg") and name.replace(".svg", ".png") in files):
            continue
        words = files.get(str(PurePosixPath(name).with_suffix(".txt")))
        caption = words.decode("utf-8", "replace").splitlines()[0].strip().rstrip(".! ") if words else ""
        decoded = _decoded(name, files[name])
        image = cropped(decoded) if decoded is not None else None
        if caption and image is not None:
            caption = caption[0].lower() + caption[1:]
            style = "drawn" if name.endswith(".svg") or "cartoon" in name else "photo"
            yield Picture(image, caption, concept_of(caption), "stamps", f"stamp-{style}", "GPL-2.0")


def _decoded(name: str, data: bytes) -> Image.Image | None:
    """The picture, or None for one of the few SVGs that state no size."""
    if name.endswith(".svg"):
        try:
            data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode("utf-8", "replace"), width=320))
        except ValueError:
            return None
    return Image.open(io.BytesIO(data))
