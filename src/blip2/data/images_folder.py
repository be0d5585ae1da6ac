"""Where the pictures of an annotation file are: the folder given, or the usual places beside the file.

coco/annotations/captions_val2014.json   <- the file
coco/val2014/COCO_val2014_000000000042.jpg   found as ../val2014, a hint of the layout
"""

from collections.abc import Iterable, Sequence

from blip2.data import places
from blip2.errors import MissingFile


def find_images(beside: str, given: str | None, names: Sequence[str], hints: Iterable[str] = ()) -> str:
    """The folder that the pictures' names begin in: of the places looked at, the first with one of `names` in it.

    Args:
        beside: the folder of the annotation file.
        given: what the user said. It is taken as it is, but for a hint within it that fits better.
        names: of a few pictures.
        hints: folders that a layout keeps its pictures in, such as val2014.

    Raises:
        MissingFile: the given folder is not there.
    """
    if given is not None and not places.is_folder(given):
        raise MissingFile(f"There is no folder {places.shown(given)} of images.")
    roots = [given] if given is not None else [beside, places.folder_of(beside)]
    hints = list(hints)
    candidates = [*roots]
    for root in roots:
        candidates += [places.join(root, hint) for hint in hints]
        candidates += [places.join(root, "images", hint) for hint in ("", *hints)]
    return next((folder for folder in candidates if any(_is_there(folder, name) for name in names)), candidates[0])


def pick(folder: str, choices: Sequence[str]) -> str:
    """The first of several names that is there; the first one where none is."""
    return next((name for name in choices if _is_there(folder, name)), choices[0])


def _is_there(folder: str, name: str) -> bool:
    place = places.below(folder, name)
    return place is not None and places.is_file(place)
