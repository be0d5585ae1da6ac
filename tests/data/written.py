"""Small real pictures and archives for the tests of readers."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(level: int, kind: str = "JPEG", size: tuple[int, int] = (24, 16), **options) -> bytes:
    """A picture's file, the same each time; each level is another picture."""
    noise = np.random.default_rng(level).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.paste((level % 256, 40, 255 - level % 256), (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def put(folder: Path, name: str, level: int = 0, kind: str = "JPEG") -> bytes:
    """Writes a picture; gives its bytes."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = encoded(level, kind)
    path.write_bytes(data)
    return data


def put_json(path: Path, value: object) -> Path:
    """Writes a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def put_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Writes a tar of files, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def told(source) -> list[tuple[str, tuple[str, ...]]]:
    """Id and captions of all samples."""
    return [(sample.id, sample.captions) for sample in source.described()]
