"""Tar shards as WebDataset lays them out, with an index for random access and a manifest written last.

    manifest.json              name, version, splits -> shards with sha256 and count, sources with licences
    train_pairs-00000.tar      KEY.webp, KEY.txt (first caption), KEY.json (the rest), sample after sample
    train_pairs-00000.idx.json offset and size of each picture, and the KEY.json of all samples

A folder without its manifest is no data set: a build that was broken off leaves nothing that looks complete.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from blip2.data.pictures import ArchivePictures
from blip2.data.records import Records
from blip2.data.sample import Question, Sample
from blip2.data.source import Source
from blip2.errors import BadData, MissingFile

Split = Source  # what `open_split` gives, for those who name the type
VERSION = 1
SAMPLES_PER_SHARD = 2000


@dataclass(frozen=True)
class Shard:
    """A written shard, as the manifest lists it; `pictures_sha256` is of the pictures alone, in order."""

    file: str
    sha256: str
    pictures_sha256: str
    count: int


def write_split(
    folder: Path, split: str, samples: Iterable[Sample], *, per_shard: int = SAMPLES_PER_SHARD
) -> list[Shard]:
    """Writes samples as shards of one split; the same samples give the same bytes. None is kept in memory."""
    shards: list[Shard] = []
    rest = iter(samples)
    while (shard := write_shard(folder, split, len(shards), islice(rest, per_shard))) is not None:
        shards.append(shard)
    return shards


def write_shard(folder: Path, split: str, number: int, samples: Iterable[Sample]) -> Shard | None:
    """Writes all samples as one shard, which has its name when it is whole; None where there are no samples."""
    rest = iter(samples)
    first = next(rest, None)
    return None if first is None else _write_shard(folder, f"{split}-{number:05d}", chain([first], rest))


def write_manifest(folder: Path, name: str, splits: dict[str, list[Shard]], **notes: Any) -> None:
    """Writes manifest.json, which makes the folder a data set. `notes` are kept beside the splits."""
    listed = {
        split: {"count": sum(shard.count for shard in shards), "shards": [asdict(shard) for shard in shards]}
        for split, shards in splits.items()
    }
    manifest = {"name": name, "version": VERSION, "splits": listed} | notes
    beside = folder / "manifest.json.partial"
    beside.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, folder / "manifest.json")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a data set.

    Raises:
        MissingFile: there is none.
        BadData: it is broken, or of a version this program does not read.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
            raise ValueError("an object with splits is expected")
    except FileNotFoundError:
        raise MissingFile(
            f"{folder} is no data set: it has no manifest.json. Make one with: blip2 data build."
        ) from None
    except (OSError, ValueError):
        raise BadData(f"{path} cannot be read. Build the data set again with: blip2 data build --force.") from None
    if manifest.get("version") != VERSION:
        raise BadData(
            f"{folder} is of version {manifest.get('version')}, this program reads {VERSION}. Build it again."
        )
    return manifest


def open_split(folder: Path | str, split: str) -> Source:
    """The samples of a split by number; pictures are read from the shards when asked for.

    Raises:
        MissingFile: no data set there, or no such split.
        BadData: a shard or its index is missing or broken.
    """
    folder = Path(folder)
    records = Records()
    paths = [folder / shard.file for shard in _shards(folder, split)]
    for number, path in enumerate(paths):
        try:
            for entry in json.loads(path.with_suffix(".idx.json").read_text(encoding="utf-8")):
                records.append((number, int(entry["offset"]), int(entry["size"])), _sample(entry["sample"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise BadData(f"The index of {path} is missing or broken. Build again: blip2 data build --force.") from None
    pictures = ArchivePictures([str(path) for path in paths], known_sha256=pictures_sha256(folder, split))
    return Source(f"{folder} ({split})", records, pictures)


def read_split(folder: Path | str, split: str) -> Iterator[Sample]:
    """The samples of a split in order; errors as in `open_split`."""
    yield from open_split(folder, split)


def pictures_sha256(folder: Path | str, split: str) -> str:
    """One hash of all pictures of a split, from the manifest; texts may change and leave it as it is."""
    shards = _shards(Path(folder), split)
    return hashlib.sha256(" ".join(shard.pictures_sha256 for shard in shards).encode()).hexdigest()


def verify(folder: Path | str) -> None:
    """Reads every shard and compares it with the manifest.

    Raises:
        BadData: a shard is missing or was changed.
    """
    folder = Path(folder)
    for split in read_manifest(folder)["splits"]:
        for shard in _shards(folder, split):
            path = folder / shard.file
            if not path.is_file():
                raise BadData(f"{path} is missing. Build the data set again with: blip2 data build --force.")
            if _sha256(path) != shard.sha256:
                raise BadData(f"{path} was changed since it was built. Build again with: blip2 data build --force.")


def _shards(folder: Path, split: str) -> list[Shard]:
    splits = read_manifest(folder)["splits"]
    if split not in splits:
        raise MissingFile(f"{folder} has no split {split!r}; it has {', '.join(splits)}.")
    try:
        return [Shard(**shard) for shard in splits[split]["shards"]]
    except TypeError:  # fields of another version of this program
        raise BadData(
            f"{folder} was written by another version of this program. Build it again with: blip2 data build --force."
        ) from None


def _write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> Shard:
    path = folder / f"{name}.tar"
    partial = folder / f"{name}.tar.partial"
    index = []
    pictures = hashlib.sha256()
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, sample in enumerate(samples):
            key = f"{name.rsplit('-', 1)[1]}{number:05d}"
            description = _description(sample)
            text = json.dumps(description, ensure_ascii=False).encode()
            offset = archive.offset + tarfile.BLOCKSIZE
            _add(archive, f"{key}.{_suffix(sample.image)}", sample.image)
            _add(archive, f"{key}.txt", sample.captions[0].encode() if sample.captions else b"")
            _add(archive, f"{key}.json", text)
            pictures.update(sample.image)
            index.append({"offset": offset, "size": len(sample.image), "sample": description})
    path.with_suffix(".idx.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)
    return Shard(path.name, _sha256(path), pictures.hexdigest(), len(index))


def _description(sample: Sample) -> dict[str, Any]:
    """All but the picture; of a question's later fields those that say something, as sets built before had none."""
    described = {name: value for name, value in asdict(sample).items() if name != "image"}
    for question in described["questions"]:
        for name in ("answers", "choices", "id"):
            if not question[name]:
                del question[name]
    return described


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, owner or mode of this machine
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _suffix(image: bytes) -> str:
    beginnings = {b"RIFF": "webp", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp"}
    return next((suffix for beginning, suffix in beginnings.items() if image.startswith(beginning)), "jpg")


def _sample(described: dict[str, Any]) -> Sample:
    fields = dict(described)
    fields["captions"] = tuple(fields.get("captions", ()))
    fields["tags"] = tuple(fields.get("tags", ()))
    fields["questions"] = tuple(_question(question) for question in fields.get("questions", ()))
    return Sample(image=b"", **fields)


def _question(described: dict[str, Any]) -> Question:
    lists = {name: tuple(described[name]) for name in ("answers", "choices") if name in described}
    return Question(**{**described, **lists})


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
