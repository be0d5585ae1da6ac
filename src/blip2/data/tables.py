"""Tables of pictures and texts: CSV, TSV, JSONL, and parquet (data/parquet.py).

A row names a picture, below the images folder, and a caption or a question with its answers. Rows of one picture are
one sample. A row that cannot be read is a fault of the source; one whose picture or text is missing is a bad sample.
"""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from blip2.data import places
from blip2.data.columns import Columns, choose_columns
from blip2.data.faults import Fault
from blip2.data.images_folder import find_images
from blip2.data.pictures import FilePictures
from blip2.data.records import NO_PICTURE, ByImage
from blip2.data.source import Source
from blip2.data.texts import NOT_UTF8, as_text, as_texts, is_utf8, make_question
from blip2.errors import BadData

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_DELIMITERS = ",;|\t"
_LONGEST_FIELD = 1 << 24
_MOST_LINES = 20  # of a quoted text; more are a quotation mark that is not closed
_NAMES_TRIED = 20
Row = tuple[int, Mapping[str, Any] | str]  # its line, and its cells, or why it cannot be read


def open_table(
    place: str,
    *,
    images: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    hints: Sequence[str] = (),
) -> Source:
    """The rows of a table.

    Args:
        place: a file, or for parquet a folder or a pattern of several.
        images: the folder that the pictures' names begin in; if not given, it is looked for beside the table.
        split: only rows that have this word in the column `split`; of several parquet files those of this name.
        columns: role -> column, where the usual names are not used.
        hints: folders that the pictures may be in.

    Raises:
        BadData: no usable columns, no rows.
    """
    if places.suffix_of(place) == ".parquet" or places.is_folder(place):
        from blip2.data.parquet import open_parquet

        return open_parquet(place, images=images, split=split, columns=columns)
    there, rows = _rows(place)
    roles = choose_columns(place, there, columns)
    if split and roles.split is None:
        raise BadData(f"{places.shown(place)} has no column 'split' to choose {split!r} by.")
    by_image, faults = collect(place, rows, roles, split)
    if not by_image:
        what = f"no rows of the split {split!r}" if split else "no rows that can be read"
        first = f": {faults[0].sample} {faults[0].reason}" if faults else ""
        raise BadData(f"{places.shown(place)} has {what}{first}.")
    folder = find_images(places.folder_of(place), images, by_image.names(_NAMES_TRIED), hints)
    return Source(place, by_image.records(), FilePictures(folder), faults)


def collect(place: str, rows: Iterable[Row], roles: Columns, split: str | None) -> tuple[ByImage, list[Fault]]:
    """The texts of all rows by picture, and the rows that cannot be read."""
    by_image, faults = ByImage(places.name_of(place)), []
    for line, row in rows:
        if isinstance(row, str):
            faults.append(Fault(f"line {line}", places.shown(place), row))
            continue
        if split and roles.split and as_text(row.get(roles.split)) != split:
            continue
        where = picture_name(row.get(roles.image))
        if where.startswith(("http://", "https://")):
            raise BadData(
                f"{places.shown(place)} names web addresses, such as {places.shown(where)}, and pictures are not "
                "fetched while training. Download them once, for example with img2dataset, and open what it wrote: "
                "webdataset:FOLDER/{00000..00331}.tar."
            )
        captions = as_texts(row.get(roles.caption)) if roles.caption else ()
        question = make_question(row.get(roles.question), row.get(roles.answer or "")) if roles.question else None
        # a row without a picture is a sample of its own, so that it is counted
        notes = {} if where else {"id": f"line {line}"}
        by_image.add(where or f"{NO_PICTURE}{line}", captions, question, **notes)
    return by_image, faults


def picture_name(value: Any) -> str:
    """The name in a cell; a cell of an object {bytes, path} has it in `path`. It keeps its spaces."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("file_name")
    return value if isinstance(value, str) else ""


def _rows(place: str) -> tuple[Sequence[str], Iterator[Row]]:
    """Names of the columns, and the rows."""
    suffix = places.suffix_of(place)
    if suffix in (".jsonl", ".ndjson"):
        rows = _json_lines(place)
        head = list(itertools.islice(rows, 100))
        named = dict.fromkeys(name for _, row in head if not isinstance(row, str) for name in row)
        if head and not named and isinstance(head[0][1], str):
            line, reason = head[0]
            raise BadData(f"{places.shown(place)} has no rows that can be read: line {line} {reason}.")
        return list(named), itertools.chain(head, rows)
    return _delimited(place, is_tab=suffix == ".tsv")


def _json_lines(place: str) -> Iterator[Row]:
    with places.open_text(place) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if not is_utf8(line):
                yield number, NOT_UTF8
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else "is no JSON object"


def _delimited(place: str, *, is_tab: bool) -> tuple[Sequence[str], Iterator[Row]]:
    with places.open_text(place) as file:
        first = file.readline()
    delimiter = "\t" if is_tab else max(_DELIMITERS, key=first.count)
    # A tab-separated file of web captions holds lone quotes, and one at the beginning of a field would otherwise
    # swallow all lines up to the next.
    quoting = csv.QUOTE_NONE if is_tab else csv.QUOTE_MINIMAL
    csv.field_size_limit(_LONGEST_FIELD)

    def rows() -> Iterator[Row]:
        with places.open_text(place) as file:
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
            next(reader, None)
            while True:
                begin = reader.line_num
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield reader.line_num, f"cannot be read: {error}"
                    continue
                if reader.line_num - begin > _MOST_LINES:
                    raise BadData(
                        f"{places.shown(place)}, line {begin + 1}: a quoted text goes on for "
                        f"{reader.line_num - begin} lines. Most likely a quotation mark is not closed: close it, or "
                        "write two where one is meant."
                    )
                if not cells:
                    continue
                if not all(map(is_utf8, cells)):
                    yield reader.line_num, NOT_UTF8
                elif len(cells) != len(names):
                    yield reader.line_num, f"has {len(cells)} fields, where the first line has {len(names)}"
                else:
                    cells = [_unquoted(cell) for cell in cells] if is_tab else cells
                    yield reader.line_num, dict(zip(names, cells, strict=True))

    names = next(csv.reader([first], delimiter=delimiter, quoting=quoting), [])
    return names, rows()


def _unquoted(cell: str) -> str:
    """A field without the quotes that a writer put around it."""
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell
