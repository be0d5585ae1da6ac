"""A large JSON file element by element, so that annotations of hundreds of megabytes never stand in memory as a whole.

    [{...}, {...}]                       -> (None, {...}), (None, {...})
    {"info": {...}, "images": [{...}]}   -> ("info", {...}), ("images", {...})
    {"07333408": {...}, ...}             -> ("07333408", {...})

Lists of the first level are gone through, all below them is decoded by the standard library.
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from blip2.data import places
from blip2.errors import BadData

_CHUNK = 1 << 20  # bytes read at once
_LARGEST = 1 << 28  # characters of one element; a file that is no JSON is not read to its end in search of one
_SPACE = " \t\r\n"


def elements(place: str) -> Iterator[tuple[str | None, Any]]:
    """The key it stands under (None in a list) and the value of each element of a JSON file.

    Raises:
        MissingFile: it is not there.
        BadData: it is no JSON, or cut short.
    """
    with places.open_binary(place) as file:
        try:
            yield from _Parser(file).elements()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise BadData(
                    f"{places.shown(place)} is not UTF-8. Write it in UTF-8, with iconv for example."
                ) from None
            raise BadData(f"{places.shown(place)} is cut short in the middle of a letter.") from None
        except (ValueError, RecursionError):
            raise BadData(f"{places.shown(place)} is not JSON, or it is cut short or damaged.") from None


class _Parser:
    """Text that was read and not yet used, and the place in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._is_all = "", 0, False

    def elements(self) -> Iterator[tuple[str | None, Any]]:
        first = self._peek()
        if first == "[":
            yield from self._list(None)
        elif first == "{":
            yield from self._object()
        else:
            raise ValueError("neither a list nor an object")
        if self._peek():
            raise ValueError("something follows the end")

    def _object(self) -> Iterator[tuple[str | None, Any]]:
        self._at += 1
        if self._peek() == "}":
            self._at += 1
            return
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise ValueError("a key that is no string")
            self._take(":")
            if self._peek() == "[":
                yield from self._list(key)
            else:
                yield key, self._value()
            if self._take(",}") == "}":
                return

    def _list(self, key: str | None) -> Iterator[tuple[str | None, Any]]:
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            yield key, self._value()
            if self._take(",]") == "]":
                return

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                if end < len(self._text) or self._is_all:  # else a number might go on
                    self._at = end
                    return value
            except ValueError:
                if self._is_all or len(self._text) - self._at > _LARGEST:
                    raise
            self._read()

    def _take(self, marks: str) -> str:
        """The next mark, which has to be one of these."""
        mark = self._peek()
        if not mark or mark not in marks:
            raise ValueError(f"one of {marks} is missing")
        self._at += 1
        return mark

    def _peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_all:
                return ""
            self._read()

    def _read(self) -> None:
        """Reads on: as much as there is already, so that a large element is decoded but a few times."""
        left = self._text[self._at :]
        data = self._file.read(max(_CHUNK, len(left)))
        self._is_all = not data
        self._text, self._at = left + self._decoder.decode(data, not data), 0
