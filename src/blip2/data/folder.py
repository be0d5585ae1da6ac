"""A folder of pictures with their texts beside them.

    a.jpg   a.txt or a.caption (or a.jpg.txt)     each line that is not empty is a caption
    metadata.jsonl, metadata.csv, metadata.parquet  a table with the column file_name, as Hugging Face's imagefolder has

Folders within are gone through, too. `split` is the name of a folder directly within.
"""

import os
from collections.abc import Mapping

from blip2.data import places
from blip2.data.faults import Fault
from blip2.data.pictures import FilePictures, is_picture_name
from blip2.data.records import Records
from blip2.data.sample import Sample
from blip2.data.source import Source
from blip2.data.tables import open_table
from blip2.data.texts import NOT_UTF8, as_text, as_texts
from blip2.errors import BadData, MissingFile

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")
_MOST_TEXT = 1 << 20  # bytes of a sidecar


def open_folder(
    place: str, *, images: str | None = None, split: str | None = None, columns: Mapping[str, str] | None = None
) -> Source:
    """The pictures of a folder.

    Raises:
        MissingFile: no such folder, or no such split in it.
        BadData: it holds no pictures, or none with a text.
    """
    if not places.is_folder(place):
        raise MissingFile(f"There is no folder {places.shown(place)}.")
    folder = places.join(place, split) if split else place
    if split and not places.is_folder(folder):
        there = ", ".join(name for name in places.names_in(place) if places.is_folder(places.join(place, name)))
        raise MissingFile(f"{places.shown(place)} has no folder {split!r}; it has {there or 'none'}.")
    for name in METADATA:
        table = places.join(folder, name)
        if places.is_file(table):
            return open_table(table, images=images or folder, columns=columns)
    if columns:
        raise BadData(f"{places.shown(folder)} has no {METADATA[0]}, so there are no columns to choose.")
    return _with_sidecars(folder, images or folder)


def _with_sidecars(folder: str, images: str) -> Source:
    """Pictures in `images`, texts at the same names in `folder`."""
    texts = {name for name in places.files_below(folder) if name.endswith(SIDECARS)}
    records, faults = Records(), []
    num_told = 0
    for name in places.files_below(images):
        if not is_picture_name(name):
            continue
        stem = os.path.splitext(name)[0]
        candidates = [base + suffix for base in (stem, name) for suffix in SIDECARS]
        beside = next((sidecar for sidecar in candidates if sidecar in texts), None)
        captions = _lines(places.join(folder, beside), as_text(name), faults) if beside else ()
        num_told += bool(captions)
        records.append(name, Sample(as_text(name), b"", captions, source="folder"))
    if not num_told and faults:
        raise BadData(f"{places.shown(folder)} has no text that can be read: {faults[0].where} {faults[0].reason}.")
    if not num_told:
        raise BadData(
            f"{places.shown(folder)} holds {len(records):,} pictures and a text to none of them. Expected a.txt or "
            f"a.caption beside a.jpg, or {METADATA[0]} with the fields file_name and text."
        )
    return Source(folder, records, FilePictures(images), faults)


def _lines(place: str, sample_id: str, faults: list[Fault]) -> tuple[str, ...]:
    try:
        text = places.read_bytes(place, most=_MOST_TEXT)
    except (BadData, MissingFile):
        faults.append(Fault(sample_id, places.shown(place), "cannot be read"))
        return ()
    try:
        if len(text) <= _MOST_TEXT:
            return as_texts(text.decode("utf-8-sig").splitlines())
        reason = "is too long to be the text of one picture"
    except UnicodeDecodeError:
        reason = NOT_UTF8
    faults.append(Fault(sample_id, places.shown(place), reason))
    return ()
