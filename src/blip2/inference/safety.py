"""Where a deployment plugs in what must not be asked or said. Off unless it is asked for.

    Filter            the hook: sees what is asked before the model does, and what is said before anybody does
    WordList          the example: refuses whole words of a list
    load_filter       "words:FILE" or "package.module:name", as `blip2 serve --filter` takes it

A word list stops what it lists and nothing else: it knows no context, no other spelling and no picture. It is an
example of the hook, not protection; the model itself repeats what it learned from pictures and texts of the web.
"""

import importlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from blip2.errors import MissingFile, UserError

SYSTEM_LINE = "Answer truthfully about the picture. Do not guess who people are, and be kind and respectful."


@runtime_checkable
class Filter(Protocol):
    """What a deployment's filter must offer; both methods may be called by several threads at once."""

    def refuses_request(self, texts: Sequence[str], images: Sequence[Image.Image]) -> str | None:
        """Why a request is refused, in words for the person who asked; None where it is not."""
        ...

    def refuses_reply(self, text: str) -> bool:
        """Whether a reply that begins with `text`, which ends at a whole word, must not go on and not be shown."""
        ...


class WordList:
    """Refuses texts that hold one of the given words or phrases, whatever their case and their accents' encoding."""

    def __init__(self, words: Sequence[str]) -> None:
        """Raises UserError where there is no word."""
        cleaned = sorted({_folded(word) for word in words if word.strip()}, key=len, reverse=True)
        if not cleaned:
            raise UserError("The word list is empty. Write one word or phrase a line.")
        joined = "|".join(re.escape(word) for word in cleaned)
        self._pattern = re.compile(rf"(?<!\w)(?:{joined})(?!\w)")

    @classmethod
    def read(cls, path: Path) -> "WordList":
        """The list in a UTF-8 file, one word or phrase a line; lines that begin with # are remarks."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            raise MissingFile(f"There is no word list {str(path)!r}.") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is no UTF-8 text.") from None
        return cls([line for line in lines if not line.startswith("#")])

    def refuses_request(self, texts: Sequence[str], images: Sequence[Image.Image]) -> str | None:
        """Names no word, so that the list cannot be read by trying."""
        del images
        found = any(self._pattern.search(_folded(text)) for text in texts)
        return "The request holds a word that is not allowed here." if found else None

    def refuses_reply(self, text: str) -> bool:
        """Whether a listed word is in it."""
        return bool(self._pattern.search(_folded(text)))


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def load_filter(name: str) -> Filter:
    """The filter that `name` stands for: "words:FILE", or "package.module:name" of an object that is one or makes one.

    Raises:
        UserError: there is none by that name, or it lacks a method.
    """
    kind, _, place = name.partition(":")
    if kind == "words":
        return WordList.read(Path(place))
    try:
        found = getattr(importlib.import_module(kind), place)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"There is no filter {name!r}. Give words:FILE, or module:name that can be imported.") from None
    made = found() if isinstance(found, type) else found
    if not isinstance(made, Filter):
        raise UserError(f"{name} is no filter: it lacks refuses_request or refuses_reply.")
    return made
