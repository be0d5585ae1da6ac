"""Which split of a data set is meant.

One rule for all layouts: the one asked for; else the only one there is; else `train`.
"""

from collections.abc import Iterable

from blip2.data import places
from blip2.errors import BadData, MissingFile


def choose_split(place: str, asked: str | None, there: Iterable[str]) -> str:
    """The split to read.

    Raises:
        MissingFile: it is not among those there, or none was asked for and there is no telling.
    """
    names = list(there)
    listed = ", ".join(names) or "none"
    if asked is not None:
        if asked not in names:
            raise MissingFile(f"{places.shown(place)} has no split {asked!r}; it has {listed}.")
        return asked
    if len(names) == 1:
        return names[0]
    if "train" in names:
        return "train"
    raise MissingFile(f"{places.shown(place)} has several splits: {listed}. Choose one: split=..., --split.")


def refuse_split(place: str, layout: str, split: str | None) -> None:
    """For layouts whose files are one split each.

    Raises:
        BadData: a split was asked for.
    """
    if split is not None:
        raise BadData(
            f"The layout {layout} has no splits within {places.shown(place)}, so {split!r} cannot be chosen. "
            "Name the file of that split."
        )
