"""Opens any data set by a short text: a path or URL whose layout shows in what is there, or with the layout in front.

coco:annotations/captions_val2014.json      karpathy:dataset_coco.json
vqa:questions.json,annotations.json         webdataset:/data/cc3m/{00000..00331}.tar
captions.csv                                s3://bucket/pictures/
"""

import difflib
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blip2 import paths
from blip2.data import places
from blip2.data.arrow import open_saved
from blip2.data.coco import open_coco, open_karpathy, open_lavis, open_nocaps
from blip2.data.flickr30k import open_flickr30k
from blip2.data.folder import METADATA, open_folder
from blip2.data.json_stream import elements
from blip2.data.shards import open_split, read_manifest
from blip2.data.source import Source
from blip2.data.splits import choose_split
from blip2.data.tables import TABLES, open_table
from blip2.data.visual_genome import open_visual_genome
from blip2.data.vqa import open_aokvqa, open_gqa, open_vqa
from blip2.data.webdataset import open_webdataset
from blip2.errors import BadData, MissingFile

_LAYOUT = re.compile(r"([A-Za-z][\w-]+):(?!//)(.+)", re.DOTALL)
_LOOKED_AT = 50  # elements of a JSON file


def _open_own(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """A data set folder of ours; see data/shards.py."""
    if images is not None:
        raise BadData(f"{places.shown(place)} holds its pictures, so a folder of images cannot be given with it.")
    if places.is_url(place):
        raise BadData(f"{place}: a folder with a manifest is read locally. Its shards alone: webdataset:{place}.")
    return open_split(place, choose_split(place, split, read_manifest(Path(place))["splits"]))


LAYOUTS: dict[str, Callable[..., Source]] = {
    "blip2": _open_own,
    "folder": open_folder,
    "table": open_table,
    "coco": open_coco,
    "nocaps": open_nocaps,
    "karpathy": open_karpathy,
    "lavis": open_lavis,
    "flickr30k": open_flickr30k,
    "visual-genome": open_visual_genome,
    "vqa": open_vqa,
    "okvqa": open_vqa,
    "aokvqa": open_aokvqa,
    "gqa": open_gqa,
    "webdataset": open_webdataset,
    "datasets": open_saved,
}
_WITH_COLUMNS = ("folder", "table", "datasets")


def open_source(
    text: str, *, images: str | None = None, split: str | None = None, columns: Mapping[str, str] | None = None
) -> Source:
    """The samples of a data set.

    Args:
        text: a path, a URL, the name of a data set under the data folder, or LAYOUT:PLACE with a layout of `LAYOUTS`.
        images: the folder that pictures are in, where the texts lie elsewhere; if not given, it is looked for.
        split: one of several in a data set; if not given, the only one or `train`.
        columns: of tables, role (image, caption, question, answer, id, split) -> column, where names are unusual.

    Raises:
        MissingFile: nothing is there, or no such split.
        BadData: the layout is unknown, or what is there is not of it; the message tells what was expected and found.
        MissingPart: a package is needed that is not installed.
    """
    layout, place = split_layout(text)
    place = places.plain(place)
    if layout is None:
        layout, place = _recognise(place)
    if columns and layout not in _WITH_COLUMNS:
        raise BadData(f"The layout {layout} has no columns to choose; {', '.join(_WITH_COLUMNS)} have.")
    options: dict[str, Any] = {"columns": columns} if columns else {}
    source = LAYOUTS[layout](place, images=places.plain(images) if images is not None else None, split=split, **options)
    source.name = f"{layout}:{place}"
    return source


def own_folder(text: str) -> Path | None:
    """The folder of one of our own data sets, by path or by name; None where the text names something else."""
    layout, place = split_layout(text)
    if layout not in (None, "blip2"):
        return None
    folders = (Path(places.plain(place)), paths.data_dir() / place)
    return next((folder for folder in folders if (folder / "manifest.json").is_file()), None)


def split_layout(text: str) -> tuple[str | None, str]:
    """`coco:a.json` -> coco, a.json. Without a layout in front, None and the text.

    Raises:
        BadData: what stands in front is no layout, and the text is no path.
    """
    found = _LAYOUT.fullmatch(text)
    if not found or places.is_file(text) or places.is_folder(text):
        return None, text
    name, place = found[1].lower().replace("_", "-"), found[2]
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, 1, 0.5)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise BadData(f"{found[1]!r} is no layout.{meant} Layouts are: {', '.join(LAYOUTS)}.")
    return name, place


def _recognise(place: str) -> tuple[str, str]:
    """The layout of what is there, and its place: a name under the data folder becomes its path."""
    if places.is_folder(place):
        return _of_folder(place), place
    named = paths.data_dir() / place
    if not places.is_file(place) and (named / "manifest.json").is_file():
        return "blip2", str(named)
    suffix = places.suffix_of(place)
    if suffix == ".tar":
        return "webdataset", place
    if suffix == ".parquet" and not places.is_file(place):
        return "table", place
    if suffix == ".token":
        return "flickr30k", place
    if suffix == ".json" and "," in place and not places.is_file(place):
        return "vqa", place
    if not places.is_file(place):
        raise MissingFile(f"There is nothing at {places.shown(place)}.")
    if suffix in TABLES:
        return "table", place
    if suffix == ".json":
        return _of_json(place), place
    raise BadData(
        f"{places.shown(place)}: no layout is known by the ending {suffix or '(none)'!r}. Expected a folder, "
        f"{', '.join(TABLES)}, .json, .tar; or put the layout in front, one of: {', '.join(LAYOUTS)}."
    )


def _of_folder(place: str) -> str:
    names = places.names_in(place)
    if "manifest.json" in names:
        return "blip2"
    if {"state.json", "dataset_dict.json"} & set(names):
        return "datasets"
    if any(name.endswith(".tar") for name in names):
        return "webdataset"
    if set(METADATA) & set(names):
        return "folder"
    if any(name.endswith(".parquet") for name in itertools.islice(places.files_below(place), 1000)):
        return "table"
    if any(name.endswith(".tar") for name in itertools.islice(places.files_below(place), 1000)):
        return "webdataset"
    return "folder"


def _of_json(place: str) -> str:
    """Which annotation file it is, by its first elements."""
    shape: dict[str | None, set[str]] = {}
    for key, value in itertools.islice(elements(place), _LOOKED_AT):
        fields = shape.setdefault(key, set())
        if isinstance(value, Mapping):
            fields.update(value)
    listed = shape.get(None, set())
    in_images = shape.get("images", set())
    signs = {
        "karpathy": "sentences" in in_images,
        "nocaps": "domain" in in_images,
        "coco": "images" in shape or "annotations" in shape,
        "vqa": "questions" in shape,
        "visual-genome": bool(listed & {"regions", "qas"}),
        "aokvqa": {"question", "image_id", "choices"} <= listed,
        "lavis": bool(listed & {"caption", "question"}) and "image" in listed,
        "gqa": any({"imageId", "question"} <= fields for key, fields in shape.items() if key is not None),
    }
    layout = next((name for name, is_so in signs.items() if is_so), None)
    if layout is None:
        keys = ", ".join(repr(key) for key in list(shape)[:8] if key is not None)
        fields = ", ".join(sorted(listed)[:8]) or "nothing"
        found = f"an object with {keys}" if keys else f"a list of objects with {fields}"
        raise BadData(
            f"{places.shown(place)} is {found}, which is no annotation file that is known ({', '.join(signs)}). "
            "A list of pictures with their captions can be written as JSONL: "
            '{"image": "a.jpg", "caption": "..."} a line.'
        )
    return layout
