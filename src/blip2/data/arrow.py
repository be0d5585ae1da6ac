"""Data sets that Hugging Face's `datasets` saved (`save_to_disk`), read with pyarrow from memory maps.

dataset_dict.json             {"splits": ["train", "validation"]}, of several splits, each a folder
state.json                    {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
data-00000-of-00001.arrow     record batches; image: {bytes, path}
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blip2.data import places
from blip2.data.columns import choose_columns
from blip2.data.images_folder import find_images
from blip2.data.parquet import arrow, is_inside, picture, record
from blip2.data.pictures import FilePictures
from blip2.data.records import Records, Where
from blip2.data.source import Source
from blip2.data.splits import choose_split, refuse_split
from blip2.data.tables import Row, collect
from blip2.data.texts import as_text
from blip2.errors import BadData, MissingFile

_ROWS = 1000  # whose texts are Python objects at once
_NAMES_TRIED = 20


def open_saved(
    place: str, *, images: str | None = None, split: str | None = None, columns: Mapping[str, str] | None = None
) -> Source:
    """A saved Dataset, or one split of a saved DatasetDict.

    Raises:
        MissingFile: it is no such folder, or has no such split.
        BadData: it is damaged, remote, or has no usable columns.
    """
    if places.is_url(place):
        raise BadData(f"{place}: Arrow files are mapped into memory, so they have to be local. Save it as parquet.")
    if places.is_file(places.join(place, "dataset_dict.json")):
        splits = _json(places.join(place, "dataset_dict.json")).get("splits", [])
        place = places.join(place, choose_split(place, split, [str(name) for name in splits]))
    else:
        refuse_split(place, "datasets", split)
    if not places.is_file(places.join(place, "state.json")):
        raise MissingFile(f"{places.shown(place)} has no state.json, so it was not written by datasets' save_to_disk.")
    tables = [_table(place, file) for file in _json(places.join(place, "state.json")).get("_data_files", [])]
    if not tables:
        raise BadData(f"{places.shown(place)} holds no rows.")
    roles = choose_columns(place, tables[0].schema.names, columns)
    texts = [name for name in (roles.caption, roles.question, roles.answer, roles.id) if name]
    if not is_inside(tables[0].schema.field(roles.image).type):
        by_image, faults = collect(place, _rows(tables, [*texts, roles.image]), roles, None)
        folder = find_images(place, images, by_image.names(_NAMES_TRIED))
        return Source(place, by_image.records(), FilePictures(folder), faults)
    records, source = Records(), places.name_of(place)
    for number, table in enumerate(tables):
        for row, cells in _rows([table], texts):
            assert not isinstance(cells, str)
            name = as_text(cells.get(roles.id)) if roles.id else ""
            records.append([number, row], record(cells, roles, name or f"{number}/{row}", source))
    return Source(place, records, ArrowPictures(place, tables, roles.image, images or place))


class ArrowPictures:
    """Pictures in a column of memory-mapped tables; where = (number of the table, row)."""

    def __init__(self, place: str, tables: Sequence[Any], column: str, folder: str) -> None:
        """`folder` is where pictures are whose cell has a path only."""
        self._place, self._folder = place, folder
        self._columns = [table.column(column) for table in tables]

    def read(self, where: Where, sample_id: str) -> bytes:
        """The picture's file."""
        number, row = (int(value) for value in where)
        return picture(self._columns[number][row].as_py(), self._folder, self.name(where), sample_id)

    def name(self, where: Where) -> str:
        """The data set's folder."""
        return places.shown(self._place)

    def sha256(self, wheres: Iterator[Where]) -> str:
        """Of the files' names, sizes and times."""
        return places.stamps_sha256(self._place, places.files_below(self._place))


def _table(place: str, file: Any) -> Any:
    pyarrow = arrow()
    name = file.get("filename") if isinstance(file, Mapping) else None
    path = places.below(place, name) if isinstance(name, str) else None
    if path is None:
        raise BadData(f"{places.shown(place)}/state.json names no file within the folder: {name!r}.")
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()
    except FileNotFoundError:
        raise MissingFile(f"There is no file {places.shown(path)}.") from None
    except (pyarrow.ArrowException, OSError):
        raise BadData(f"{places.shown(path)} is no Arrow stream, or it is damaged.") from None


def _rows(tables: Sequence[Any], columns: Sequence[str]) -> Iterator[Row]:
    for table in tables:
        row = 0
        for batch in table.select(list(dict.fromkeys(columns))).to_batches(max_chunksize=_ROWS):
            for cells in batch.to_pylist():
                yield row, cells
                row += 1


def _json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(places.read_bytes(path))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadData(f"{places.shown(path)} is not the JSON that datasets writes.")
    return found
