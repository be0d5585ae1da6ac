"""Parquet tables, with the pictures inside (`image: {bytes, path}`, as Hugging Face writes them) or named by path.

A picture inside can only be read with its whole row group, so reading in random order is slow: the groups last used are
kept, and `blip2 data shard` makes of such a table what can be read one by one.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blip2.data import places
from blip2.data.columns import Columns, choose_columns
from blip2.data.images_folder import find_images
from blip2.data.pictures import FilePictures, checked
from blip2.data.records import Records, Where
from blip2.data.sample import Sample
from blip2.data.source import Source
from blip2.data.splits import choose_split
from blip2.data.tables import Row, collect
from blip2.data.texts import as_text, as_texts, make_question
from blip2.errors import BadData, BadSample, MissingFile, MissingPart

_PART = re.compile(r"(.+?)[-_]\d+(?:-of-\d+)?(?:-[0-9a-f]+)?")  # train-00000-of-00005-1d0b8a, the split in front
_KEPT_GROUPS = 2
_NAMES_TRIED = 20


def open_parquet(
    place: str, *, images: str | None = None, split: str | None = None, columns: Mapping[str, str] | None = None
) -> Source:
    """The rows of a parquet file, or of all files of a folder or pattern; arguments as in `open_table`."""
    files, split = _files(place, split)
    described = _schema(files[0])
    roles = choose_columns(files[0], described.names, columns)
    if split and roles.split is None:
        raise BadData(f"{places.shown(place)} has no column 'split' to choose {split!r} by.")
    if is_inside(described.field(roles.image).type):
        return _with_pictures_inside(place, files, roles, split, images)
    by_image, faults = collect(place, _all_rows(files, roles, with_image=True), roles, split)
    folder = find_images(places.folder_of(files[0]), images, by_image.names(_NAMES_TRIED))
    return Source(place, by_image.records(), FilePictures(folder), faults)


def arrow() -> Any:
    """The library pyarrow.

    Raises:
        MissingPart: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPart("Parquet and Arrow files need pyarrow: pip install 'blip2[data]'.") from None
    return pyarrow


def is_inside(kind: Any) -> bool:
    """Whether a column of this type holds pictures, and not their names."""
    types = arrow().types
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def record(row: Mapping[str, Any], roles: Columns, name: str, source: str) -> Sample:
    """The sample in a row that holds its picture."""
    captions = as_texts(row.get(roles.caption)) if roles.caption else ()
    question = make_question(row.get(roles.question), row.get(roles.answer or "")) if roles.question else None
    return Sample(name, b"", captions, (question,) if question else (), source=source)


def picture(cell: Any, folder: str, name: str, sample_id: str) -> bytes:
    """The picture in a cell: its bytes, or a path below `folder` where the cell has no bytes.

    Raises:
        BadSample: there is none.
    """
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if data is None and isinstance(cell, Mapping) and cell.get("path"):
        return FilePictures(folder).read(cell["path"], sample_id)
    return checked(data or b"", name, sample_id, is_within=True)


def _with_pictures_inside(
    place: str, files: Sequence[str], roles: Columns, split: str | None, images: str | None
) -> Source:
    records, source = Records(), places.name_of(place)
    for number, file in enumerate(files):
        rows = _all_rows([file], roles, with_image=False)
        for group, row, cells in _by_group(file, rows):
            if split and roles.split and as_text(cells.get(roles.split)) != split:
                continue
            name = as_text(cells.get(roles.id)) if roles.id else ""
            name = name or f"{places.name_of(file)}/{group}/{row}"
            records.append([number, group, row], record(cells, roles, name, source))
    if not len(records):
        raise BadData(f"{places.shown(place)} has no rows{f' of the split {split!r}' if split else ''}.")
    pictures = ParquetPictures(files, roles.image, images or places.folder_of(files[0]))
    return Source(place, records, pictures, [])


class ParquetPictures:
    """Pictures in a column of parquet files; where = (number of the file, row group, row in it)."""

    def __init__(self, files: Sequence[str], column: str, folder: str) -> None:
        """`folder` is where pictures are whose cell has a path only."""
        self._files, self._column, self._folder = files, column, folder
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def read(self, where: Where, sample_id: str) -> bytes:
        """The picture's file; its row group is read unless it was among the last."""
        number, group, row = (int(value) for value in where)
        try:
            cells = self._group(number, group)
        except (BadData, MissingFile):
            raise BadSample(sample_id, self.name(where), f"cannot be read in its row group {group}") from None
        return picture(cells[row].as_py(), self._folder, self.name(where), sample_id)

    def name(self, where: Where) -> str:
        """The parquet file."""
        return places.shown(self._files[int(where[0])])

    def sha256(self, wheres: Iterator[Where]) -> str:
        """Of the files' names, sizes and times."""
        folder = places.folder_of(self._files[0])
        return places.stamps_sha256(folder, (places.name_of(file) for file in self._files))

    def _group(self, number: int, group: int) -> Any:
        cells = self._kept.get((number, group))
        if cells is None:
            cells = _read(self._files[number], group, [self._column]).column(0)
            self._kept[number, group] = cells
            while len(self._kept) > _KEPT_GROUPS:
                self._kept.popitem(last=False)
        return cells


def _files(place: str, split: str | None) -> tuple[list[str], str | None]:
    """The parquet files meant, and the split that is still to be chosen by a column."""
    if not places.is_folder(place):
        return places.expand(place), split
    below = [name for name in places.files_below(place) if name.endswith(".parquet")]
    if not below:
        raise MissingFile(f"{places.shown(place)} holds no .parquet file.")
    stems = {name: places.name_of(name).removesuffix(".parquet") for name in below}
    parts = {name: _PART.fullmatch(stem) for name, stem in stems.items()}
    named = {name: part[1] if part else stems[name] for name, part in parts.items()}
    if split is None and not any(parts.values()):
        return [places.join(place, name) for name in below], None
    chosen = choose_split(place, split, dict.fromkeys(named.values()))
    return [places.join(place, name) for name in below if named[name] == chosen], None


def _schema(file: str) -> Any:
    return _opened(file, lambda opened: opened.schema_arrow)


def _read(file: str, group: int, columns: Sequence[str]) -> Any:
    # no threads: this also runs in forked workers, which have none of the parent's
    return _opened(file, lambda opened: opened.read_row_group(group, columns=list(columns), use_threads=False))


def _opened(file: str, use: Any) -> Any:
    """What `use` gives of the opened file."""
    pyarrow = arrow()
    with places.open_binary(file) as handle:
        try:
            return use(pyarrow.parquet.ParquetFile(handle))
        except (pyarrow.ArrowException, OSError):
            raise BadData(f"{places.shown(file)} is no parquet file, or it is damaged.") from None


def _all_rows(files: Sequence[str], roles: Columns, *, with_image: bool) -> Iterator[Row]:
    """Row after row, without the pictures inside; numbered by row group and row in it."""
    named = [roles.caption, roles.question, roles.answer, roles.id, roles.split, roles.image if with_image else None]
    columns = list(dict.fromkeys(name for name in named if name))
    for file in files:
        for group in range(_opened(file, lambda opened: opened.num_row_groups)):
            yield from enumerate(_read(file, group, columns).to_pylist())


def _by_group(file: str, rows: Iterator[Row]) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Row group, row in it, and cells."""
    group = -1
    for row, cells in rows:
        group += row == 0
        assert not isinstance(cells, str)
        yield group, row, cells
