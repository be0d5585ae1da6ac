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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

from blip2.data.sample import Question, Sample
from blip2.errors import BadData, MissingFile

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
    """Writes samples as shards of one split; the same samples give the same bytes."""
    shards: list[Shard] = []
    waiting: list[Sample] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == per_shard:
            shards.append(_write_shard(folder, f"{split}-{len(shards):05d}", waiting))
            waiting = []
    if waiting:
        shards.append(_write_shard(folder, f"{split}-{len(shards):05d}", waiting))
    return shards


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


def open_split(folder: Path | str, split: str) -> "Split":
    """The samples of a split by number; pictures are read from the shards when asked for.

    Raises:
        MissingFile: no data set there, or no such split.
        BadData: a shard or its index is missing or broken.
    """
    return Split(Path(folder), _shards(Path(folder), split))


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


class Split(Sequence[Sample]):
    """A split, held as its descriptions; `split[i].image` is read from disk at `split[i]`."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._entries: list[tuple[Path, dict[str, Any]]] = []
        for shard in shards:
            path = folder / shard.file
            try:
                index = json.loads(path.with_suffix(".idx.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise BadData(
                    f"The index of {path} is missing or broken. Build again: blip2 data build --force."
                ) from None
            self._entries += [(path, entry) for entry in index]

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, entry = self._entries[index]
        with open(path, "rb") as file:
            file.seek(entry["offset"])
            image = file.read(entry["size"])
        return _sample(entry["sample"], image)

    def described(self) -> Iterator[Sample]:
        """All samples without their pictures (`image` is empty), which costs no reading."""
        for _, entry in self._entries:
            yield _sample(entry["sample"], b"")


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


def _write_shard(folder: Path, name: str, samples: Sequence[Sample]) -> Shard:
    path = folder / f"{name}.tar"
    index = []
    pictures = hashlib.sha256()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, sample in enumerate(samples):
            key = f"{name.rsplit('-', 1)[1]}{number:05d}"
            description = {k: v for k, v in asdict(sample).items() if k != "image"}
            text = json.dumps(description, ensure_ascii=False).encode()
            offset = archive.offset + tarfile.BLOCKSIZE
            _add(archive, f"{key}.{_suffix(sample.image)}", sample.image)
            _add(archive, f"{key}.txt", sample.captions[0].encode() if sample.captions else b"")
            _add(archive, f"{key}.json", text)
            pictures.update(sample.image)
            index.append({"offset": offset, "size": len(sample.image), "sample": description})
    path.with_suffix(".idx.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    return Shard(path.name, _sha256(path), pictures.hexdigest(), len(samples))


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, owner or mode of this machine
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _suffix(image: bytes) -> str:
    if image.startswith(b"RIFF"):
        return "webp"
    return "png" if image.startswith(b"\x89PNG") else "jpg"


def _sample(described: dict[str, Any], image: bytes) -> Sample:
    fields = dict(described)
    fields["captions"] = tuple(fields.get("captions", ()))
    fields["tags"] = tuple(fields.get("tags", ()))
    fields["questions"] = tuple(Question(**question) for question in fields.get("questions", ()))
    return Sample(image=image, **fields)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
