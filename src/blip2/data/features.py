"""Image features kept on disk, so that a frozen encoder sees each picture once and not once an epoch.

One folder a cache: `features.f16` or `features.f32` (rows, N, C), `cache.json`, which names what the rows were made
from, and `faults.jsonl`, which pictures could not be read and why: their rows are NaN. A cache made from other weights,
pictures or views is another key and is never read by mistake. Building can be stopped at any time and goes on where it
was.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from blip2.data.faults import Fault
from blip2.errors import BadData

FAULTS = "faults.jsonl"


@dataclass(frozen=True)
class CacheKey:
    """What decides the contents of a cache.

    Attributes:
        encoder: sha256 of the encoder's weights.
        pictures: sha256 of the pictures' shards.
        views: how views of a picture are made, in words; changes when the code of the views changes.
        num_rows: pictures times views.
        shape: (N, C) of one row.
        dtype: of the numbers.
    """

    encoder: str
    pictures: str
    views: str
    num_rows: int
    shape: tuple[int, int]
    dtype: Literal["float16", "float32"] = "float16"

    @property
    def name(self) -> str:
        """Short and unique: the folder's name."""
        return hashlib.sha256(json.dumps(_plain(self), sort_keys=True).encode()).hexdigest()[:16]


class FeatureCache:
    """A complete cache, read row by row from a memory map.

    Attributes:
        faults: number of a picture that could not be read -> why.
    """

    def __init__(self, folder: Path, key: CacheKey) -> None:
        """Opens the cache of `key` in `folder`.

        Raises:
            BadData: it is not complete, or was made from something else.
        """
        described = _read_description(folder)
        if described.get("key") != _plain(key):
            raise BadData(
                f"{folder} holds features of other weights, pictures or views. Delete it; it will be rebuilt."
            )
        if described["rows_done"] != key.num_rows:
            raise BadData(f"{folder} is not complete: {described['rows_done']} of {key.num_rows} rows.")
        self._rows = _open_rows(folder, key, "r")
        self.faults = read_faults(folder)

    def __len__(self) -> int:
        return self._rows.shape[0]

    def read(self, rows: np.ndarray | int) -> np.ndarray:
        """Features (len(rows), N, C) of the numbered rows; (N, C) of one."""
        return self._rows[rows]


def note_fault(folder: Path, index: int, fault: Fault) -> None:
    """Writes down, for good, why a picture has no features."""
    with (folder / FAULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"index": index} | asdict(fault)) + "\n")


def read_faults(folder: Path) -> dict[int, Fault]:
    """What `note_fault` wrote; a line that was broken off is left out."""
    found: dict[int, Fault] = {}
    if (folder / FAULTS).is_file():
        for line in (folder / FAULTS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                told = json.loads(line)
                found[int(told["index"])] = Fault(told["sample"], told["where"], told["reason"])
    return found


def num_done(folder: Path) -> int:
    """How many rows of a cache are made already."""
    return int(_read_description(folder).get("rows_done", 0))


def open_or_build(
    parent: Path,
    key: CacheKey,
    encode: Callable[[range], np.ndarray],
    *,
    chunk: int = 64,
    progress: Callable | None = None,
) -> FeatureCache:
    """The cache of `key` under `parent`; rows that are missing are made first.

    Args:
        encode: gives features (len(range), N, C) of the rows in a range.
        chunk: rows a call.
        progress: called with (rows done, rows in all) after each chunk.
    """
    folder = parent / key.name
    folder.mkdir(parents=True, exist_ok=True)
    described = _read_description(folder)
    if described.get("key") not in (None, _plain(key)):
        raise BadData(f"{folder} holds features of something else. Delete it; it will be rebuilt.")
    done = described.get("rows_done", 0)
    if done < key.num_rows:
        rows = _open_rows(folder, key, "r+" if _rows_file(folder, key).exists() else "w+")
        while done < key.num_rows:
            until = min(done + chunk, key.num_rows)
            rows[done:until] = encode(range(done, until))
            done = until
            if done % (chunk * 16) == 0 or done == key.num_rows:
                rows.flush()
                _write_description(folder, key, done)
            if progress:
                progress(done, key.num_rows)
        del rows
    return FeatureCache(folder, key)


def _rows_file(folder: Path, key: CacheKey) -> Path:
    return folder / ("features.f16" if key.dtype == "float16" else "features.f32")


def _open_rows(folder: Path, key: CacheKey, mode: Literal["r", "r+", "w+"]) -> np.memmap:
    return np.memmap(_rows_file(folder, key), key.dtype, mode, shape=(key.num_rows, *key.shape))


def _plain(key: CacheKey) -> dict:
    plain = json.loads(json.dumps(asdict(key)))
    if key.dtype == "float16":
        del plain["dtype"]  # so that caches made before there was another one keep their names
    return plain


def _read_description(folder: Path) -> dict:
    try:
        return json.loads((folder / "cache.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadData(f"{folder / 'cache.json'} cannot be read: {type(error).__name__}. Delete the folder.") from None


def _write_description(folder: Path, key: CacheKey, done: int) -> None:
    temporary = folder / "cache.json.partial"
    temporary.write_text(json.dumps({"key": _plain(key), "rows_done": done}, indent=1))
    os.replace(temporary, folder / "cache.json")
