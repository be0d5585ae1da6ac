"""Which column of a table holds the picture, the captions, the question and the answers.

Found by their usual names, or chosen: columns={"image": "path", "caption": "alt"}.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blip2.data import places
from blip2.errors import BadData

USUAL_NAMES = {
    "image": (
        "image image_path img_path file_name filename filepath file_path image_file image_name path img url image_url"
    ).split(),
    "caption": (
        "caption captions text texts title alt alt_text description sentence sentences raw comment top_caption"
    ).split(),
    "question": ["question"],
    "answer": "answers answer direct_answers multiple_choice_answer label".split(),
    "id": "id image_id key".split(),
    "split": ["split"],
}


@dataclass(frozen=True)
class Columns:
    """The column of each role; None where the table has none. There is an image, and a caption or a question."""

    image: str
    caption: str | None
    question: str | None
    answer: str | None
    id: str | None
    split: str | None


def choose_columns(place: str, there: Sequence[str], chosen: Mapping[str, str] | None) -> Columns:
    """The roles of a table's columns.

    Raises:
        BadData: a chosen column is not there, or no column of the table has a usual name of a role that is needed.
    """
    if not any(name.strip() for name in there):
        raise BadData(f"{places.shown(place)} names no columns: its first line, or the fields of its rows, must.")
    chosen = dict(chosen or {})
    if unknown := set(chosen) - set(USUAL_NAMES):
        raise BadData(f"{sorted(unknown)[0]!r} is no role of a column. Roles are: {', '.join(USUAL_NAMES)}.")
    for role, column in chosen.items():
        if column not in there:
            near = difflib.get_close_matches(column, there, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise BadData(f"{places.shown(place)} has no column {column!r} for {role}.{meant} {_listed(there)}")
    by_name = {column.strip().lower(): column for column in reversed(there)}  # of two alike, the first

    def found(role: str) -> str | None:
        usual = (by_name[name] for name in USUAL_NAMES[role] if name in by_name)
        return chosen.get(role) or next((column for column in usual if column not in chosen.values()), None)

    image, caption, question, answer = (found(role) for role in ("image", "caption", "question", "answer"))
    if image is None:
        raise BadData(_missing(place, "image", there))
    if caption is None and question is None:
        raise BadData(_missing(place, "caption", there))
    return Columns(image, caption, question, answer, found("id"), found("split"))


def _missing(place: str, role: str, there: Sequence[str]) -> str:
    usual = ", ".join(USUAL_NAMES[role][:8])
    return (
        f"{places.shown(place)} has no column with a usual name for the {role} ({usual}, ...). {_listed(there)} "
        f"Choose one: columns={{'{role}': NAME}}, on the command line --column {role}=NAME."
    )


def _listed(there: Sequence[str]) -> str:
    return f"It has: {', '.join(repr(column) for column in there[:40])}."
