"""Millions of samples in memory, without their pictures: one line of JSON each, end to end, decoded when asked for.

    blob   [where,"id",["a caption",...],[questions],{the rest}] [where,...  ...
    ends   where each line ends

A sample costs its texts in UTF-8 and about 50 bytes more, and no Python objects, so that worker processes share the
pages and do not copy them by counting references. Measured: 1 M samples of one caption of 50 letters take 0.12 GB.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from typing import Any

from blip2.data.sample import Question, Sample
from blip2.data.texts import as_text

Where = str | Sequence[int]  # a picture's name below its folder, or numbers that its reader understands

NO_PICTURE = "\0"  # begins the name under which texts without a picture are collected
_MORE = ("tags", "source", "style", "concept", "licence")


class Records:
    """A growing list of (where the picture is, sample without picture)."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._ends = array("Q")

    def append(self, where: Where, sample: Sample) -> None:
        """Adds a sample; its picture is not kept."""
        self.append_line(encode(where, sample))

    def append_line(self, line: bytes) -> None:
        """Adds what `encode` gave."""
        self._blob += line
        self._ends.append(len(self._blob))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[Where, Sample]:
        return decode(self.line(index))

    def __iter__(self) -> Iterator[tuple[Where, Sample]]:
        return (self[index] for index in range(len(self)))

    def line(self, index: int) -> bytes:
        """The encoded sample."""
        return bytes(self._blob[self._ends[index - 1] if index else 0 : self._ends[index]])


def encode(where: Where, sample: Sample) -> bytes:
    """One line of JSON; what is empty is left out."""
    questions = [_trimmed(list(astuple(question))) for question in sample.questions]
    more = {name: getattr(sample, name) for name in _MORE if getattr(sample, name)}
    fields = _trimmed([where, sample.id, sample.captions, questions, more])
    # file names that are no UTF-8 reach Python as single surrogates and have to find their way back
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def decode(line: bytes) -> tuple[Where, Sample]:
    """What `encode` was given; the picture is empty."""
    where, name, *rest = json.loads(line.decode("utf-8", "surrogatepass"))
    captions, questions, more = rest + [(), (), {}][len(rest) :]
    if "tags" in more:
        more["tags"] = tuple(more["tags"])
    return where, Sample(name, b"", tuple(captions), tuple(map(_question, questions)), **more)


def _question(fields: list[Any]) -> Question:
    values: list[Any] = [tuple(field) if isinstance(field, list) else field for field in fields]
    return Question(*values)


def _trimmed(fields: list[Any]) -> list[Any]:
    """Without the empty fields at the end, but for the first three."""
    while len(fields) > 3 and not fields[-1]:
        fields.pop()
    return fields


class ByImage:
    """Texts collected by picture, in the order in which the pictures first come up.

    While it collects, a picture of one caption costs about 0.4 kB; `records` gives that back.
    """

    def __init__(self, source: str) -> None:
        """`source` is the samples' source."""
        self.source = source
        self._texts: dict[str, tuple[list[str], list[Question]]] = {}
        self._notes: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def names(self, most: int) -> list[str]:
        """The first pictures."""
        return [name for name, _ in zip(self._texts, range(most), strict=False)]

    def add(self, picture: str, captions: Sequence[str] = (), question: Question | None = None, **notes: Any) -> None:
        """Adds to a picture what is said or asked of it; `notes` are further fields of Sample, its id among them."""
        texts = self._texts.get(picture)
        if texts is None:
            texts = self._texts[picture] = ([], [])
        texts[0].extend(captions)
        if question is not None:
            texts[1].append(question)
        if notes and picture not in self._notes:
            self._notes[picture] = notes

    def records(self, file_of: Callable[[str], str] | None = None) -> Records:
        """All samples. The collection is empty afterwards.

        Args:
            file_of: the picture's name below its folder, where what was added is a number and not that name.
        """
        records = Records()
        for picture in list(self._texts):
            captions, questions = self._texts.pop(picture)
            fields: dict[str, Any] = {"id": as_text(picture), "source": self.source} | self._notes.pop(picture, {})
            sample = Sample(image=b"", captions=tuple(captions), questions=tuple(questions), **fields)
            where = file_of(picture) if file_of else picture
            records.append("" if where.startswith(NO_PICTURE) else where, sample)
        return records
