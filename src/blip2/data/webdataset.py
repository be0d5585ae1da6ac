"""Tar shards as WebDataset and img2dataset write them (CC3M, CC12M, SBU, LAION): KEY.jpg, KEY.txt, KEY.json.

An archive is gone through once. What was found is kept as an index beside it, or under the cache folder where it lies
read-only or remote; samples are then read by offset, in any order:

    00000.tar.blip2-index    {"version", "size", "changed", "count", "faults"}
                             [[0,offset,size],"KEY",["a caption"]]      a line of data/records.py for each sample

An archive that is cut short or damaged gives the samples before the damage, and the damage is one of its faults.
"""

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from blip2 import paths
from blip2.data import places
from blip2.data.faults import Fault
from blip2.data.loader import OrderedLoader
from blip2.data.pictures import PICTURE_SUFFIXES, ArchivePictures
from blip2.data.records import Records, encode
from blip2.data.sample import Question, Sample
from blip2.data.source import Source
from blip2.data.splits import choose_split, refuse_split
from blip2.data.texts import as_text, as_texts, make_question
from blip2.errors import BadData, MissingFile

VERSION = 2
TEXT_NOT_UTF8 = "has a text for it that is not UTF-8"
_TEXTS = (".txt", ".text", ".caption")
_MOST_TEXT = 1 << 20  # bytes of a text or JSON member
_INDEX_AT_ONCE = 8  # archives, in processes
_NUMBERED = b"[[0,"


@dataclass
class _Member:
    """The members of one key that were found so far."""

    image: tuple[int, int] = (0, 0)  # offset, size
    has_image: bool = False
    text: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def open_webdataset(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """The samples of one or many tar archives.

    Args:
        place: a tar, a pattern such as /data/cc3m/{00000..00331}.tar, or a folder of tars.
        split: of a folder, the one within it that holds the tars.

    Raises:
        MissingFile: an archive is not there.
        BadData: no archive holds a sample.
    """
    if images is not None:
        raise BadData("Tar shards hold their pictures, so a folder of images cannot be given with them.")
    archives = _archives(place, split)
    _index_all(archives)
    records, faults = Records(), []
    for number, archive in enumerate(archives):
        head, lines = _read_index(archive) or _index(archive)
        faults += [Fault(**fault) for fault in head["faults"]]
        for line in lines:
            records.append_line(b"[[%d," % number + line.removeprefix(_NUMBERED))
    if not len(records):
        told = f" {faults[0].where} {faults[0].reason}." if faults else ""
        raise BadData(f"{places.shown(place)} holds no KEY.jpg with KEY.txt or KEY.json.{told}")
    return Source(place, records, ArchivePictures(archives), faults)


def _archives(place: str, split: str | None) -> list[str]:
    if places.is_folder(place):
        below = [name for name in places.names_in(place) if name.endswith(".tar")]
        if not below:
            within = [name for name in places.names_in(place) if places.is_folder(places.join(place, name))]
            within = [name for name in within if _has_tars(places.join(place, name))]
            if not within:
                raise MissingFile(f"{places.shown(place)} holds no .tar file.")
            return _archives(places.join(place, choose_split(place, split, within)), None)
        refuse_split(place, "webdataset", split)
        return [places.join(place, name) for name in below]
    refuse_split(place, "webdataset", split)
    if places.suffix_of(place) in (".gz", ".tgz", ".zst", ".bz2", ".xz"):
        raise BadData(f"{places.shown(place)} is compressed, and samples are read by offset. Decompress it to .tar.")
    archives = places.expand(place)
    for archive in archives:
        if not places.is_file(archive):
            raise MissingFile(f"There is no archive {places.shown(archive)}, which {places.shown(place)} stands for.")
    return archives


def _has_tars(folder: str) -> bool:
    return any(name.endswith(".tar") for name in places.names_in(folder))


def _index_all(archives: Sequence[str]) -> None:
    """Makes the indexes that are missing, several at once where that is worth it."""
    missing = [archive for archive in archives if _read_index(archive) is None]
    workers = min(len(missing) // 2, os.cpu_count() or 1, _INDEX_AT_ONCE)
    if workers < 2:
        return
    with OrderedLoader(lambda position: len(_index(missing[position])[1]), workers=workers, ahead=workers) as loader:
        for _ in loader.stream(0, len(missing)):
            pass


def _index(archive: str) -> tuple[dict[str, Any], list[bytes]]:
    """Goes through an archive and keeps what was found."""
    size, changed = places.stamp(archive)
    lines, faults = _go_through(archive, size)
    head = {"version": VERSION, "size": size, "changed": changed, "count": len(lines)}
    head["faults"] = [asdict(fault) for fault in faults]
    _write_index(archive, json.dumps(head).encode() + b"\n" + b"".join(line + b"\n" for line in lines))
    return head, lines


def _go_through(archive: str, size: int) -> tuple[list[bytes], list[Fault]]:
    members: dict[str, _Member] = {}
    faults: list[Fault] = []
    stem = places.name_of(archive).removesuffix(".tar")
    with places.open_binary(archive) as file:
        for member, data in _members(file, size, archive, faults):
            key, suffix = _key(member.name)
            if not key:
                continue
            found = members.setdefault(key, _Member())
            if suffix.endswith(PICTURE_SUFFIXES):
                if found.has_image:
                    reason = f"has a second picture of this name, {places.shown(member.name)}; the first is used"
                    faults.append(Fault(as_text(key), places.shown(archive), reason))
                    continue
                found.image, found.has_image = (member.offset_data, member.size), True
            elif suffix.endswith(_TEXTS) and found.text is None:
                try:
                    found.text = data.decode("utf-8-sig")
                except UnicodeDecodeError:
                    faults.append(Fault(as_text(f"{stem}/{key}"), places.shown(archive), TEXT_NOT_UTF8))
            elif suffix.endswith(".json") and not found.notes:
                try:
                    found.notes = _object(data.decode("utf-8-sig"))
                except UnicodeDecodeError:
                    faults.append(Fault(as_text(f"{stem}/{key}"), places.shown(archive), TEXT_NOT_UTF8))
    lines = [encode([0, *member.image], _sample(f"{stem}/{key}", member)) for key, member in members.items()]
    return lines, faults


def _members(file: BinaryIO, size: int, archive: str, faults: list[Fault]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The files of an archive up to its end or damage, with the contents of those that are texts."""
    end = count = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it keeps all, though none is wanted
                after = member.offset_data + member.size
                if after > size:
                    break
                end = max(end, after + -after % tarfile.BLOCKSIZE)
                if not member.isreg() or member.sparse is not None:
                    continue
                is_text = member.name.lower().endswith((*_TEXTS, ".json")) and member.size <= _MOST_TEXT
                taken = tar.extractfile(member) if is_text else None
                count += 1
                yield member, taken.read() if taken else b""
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        pass
    if not _ends_well(file, end):
        reason = f"is cut short or damaged after byte {end:,}; the {count:,} files before that are used"
        faults.append(Fault("", places.shown(archive), reason))


def _ends_well(file: BinaryIO, end: int) -> bool:
    """Whether the two blocks of zeros follow that end every archive: it may have been cut off between two files."""
    file.seek(end)
    mark = file.read(2 * tarfile.BLOCKSIZE)
    return len(mark) == 2 * tarfile.BLOCKSIZE and not any(mark)


def _key(name: str) -> tuple[str, str]:
    """`dir/0001.seg.jpg` -> `dir/0001`, `.seg.jpg`; "" for hidden files and for those without an ending."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem if stem and dot else ""), f".{suffix.lower()}"


def _object(data: str) -> Mapping[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
        if isinstance(found, Mapping):
            return found
    return {}


def _sample(name: str, member: _Member) -> Sample:
    """The text first, else what KEY.json says: `captions`, `caption` or `text`, and `questions` as we write them."""
    notes = member.notes
    written = as_texts(notes.get("captions"))  # our own shards, whose KEY.txt is the first of these
    captions = written or as_texts([member.text]) or as_texts(notes.get("caption") or notes.get("text"))
    asked = notes.get("questions")
    questions = [_question(one) for one in asked if isinstance(one, Mapping)] if isinstance(asked, list) else []
    return Sample(as_text(name), b"", captions, tuple(one for one in questions if one), source="webdataset")


def _question(fields: Mapping[str, Any]) -> Question | None:
    answers = fields.get("answers") or fields.get("answer")
    return make_question(
        fields.get("question"), answers, kind=fields.get("kind"), choices=fields.get("choices"), number=fields.get("id")
    )


def _index_files(archive: str) -> list[Path]:
    """Where an index may lie: beside the archive, or in the cache folder."""
    whole = archive if places.is_url(archive) else os.path.abspath(archive)
    name = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    cached = paths.home() / "indexes" / f"{name}.blip2-index"
    return [cached] if places.is_url(archive) else [Path(f"{archive}.blip2-index"), cached]


def _read_index(archive: str) -> tuple[dict[str, Any], list[bytes]] | None:
    """The kept index, if it is whole and of the archive as it is now."""
    size, changed = places.stamp(archive)
    for path in _index_files(archive):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            first, *lines = path.read_bytes().splitlines()
            head = json.loads(first)
            known = (head["version"], head["size"], head["changed"], head["count"])
            if known == (VERSION, size, changed, len(lines)) and all(line.startswith(_NUMBERED) for line in lines):
                return head, lines
    return None


def _write_index(archive: str, text: bytes) -> None:
    """Keeps an index where it may be written; where nowhere, the archive is gone through again next time."""
    for path in _index_files(archive):
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(text)
            os.replace(partial, path)
            return
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
