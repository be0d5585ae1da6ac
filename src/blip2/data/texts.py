"""From what stands in a table's cell or a JSON field to captions and questions.

People write a caption as a string, as a list of strings, as a list in JSON inside a CSV cell, or leave it out. Here all
become a tuple of clean strings, which is empty where nothing was said.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blip2.data.sample import Question

NOT_UTF8 = "is not UTF-8"  # why a text is left out
_SINGLE = re.compile("[\udc80-\udcff]")
_FIELDS_OF_TEXT = ("answer", "caption", "raw", "text", "phrase")  # of an object that stands for a text


def is_utf8(text: str) -> bool:
    """Whether no byte of it was none of UTF-8's: those come as single surrogates from `places.open_text`."""
    return text.isascii() or _SINGLE.search(text) is None


def as_text(value: Any) -> str:
    """The value in one line, "" where it is no text: None, NaN, true, an object of unknown fields."""
    if isinstance(value, Mapping):
        value = next((value[field] for field in _FIELDS_OF_TEXT if field in value), None)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    # half a surrogate pair, which JSON can spell, would stop a tokenizer later
    return " ".join(str(value).encode("utf-8", "replace").decode("utf-8").split())


def as_texts(value: Any) -> tuple[str, ...]:
    """One text or several, in their order; empty ones are left out."""
    if isinstance(value, str) and value.startswith("[") and value.rstrip().endswith("]"):
        value = _listed(value)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        value = [value]
    return tuple(text for text in map(as_text, value) if text)


def _listed(value: str) -> Any:
    """The list which a cell spells in JSON, or the cell as it is: a caption may stand in brackets."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else value


def most_frequent(answers: Iterable[str]) -> str:
    """The answer given most often, the first given among equals; "" of none."""
    counted = Counter(answers)
    return max(counted, key=lambda answer: counted[answer]) if counted else ""


def make_question(
    question: Any, answers: Any = None, *, kind: Any = "", choices: Any = None, number: Any = ""
) -> Question | None:
    """A question with one answer or several; None where nothing is asked.

    Args:
        answers: a text, a list of texts, or a list of objects with the field `answer`, as VQAv2 has it.
        number: the question's own id.
    """
    asked, said = as_text(question), as_texts(answers)
    if not asked:
        return None
    several = said if len(said) > 1 else ()
    return Question(asked, most_frequent(said), as_text(kind), several, as_texts(choices), as_text(number))
