"""Captions in the JSON files of COCO and of those who share its pictures.

coco       {"images": [{id, file_name}], "annotations": [{image_id, caption}]}      captions_train2014.json
nocaps     the same, and each image has its `domain` (in-, near-, out-domain), kept as the sample's style
karpathy   {"images": [{filepath, filename, split, sentences: [{raw}]}]}            dataset_coco.json
lavis      [{image, caption, image_id}] or [{image, question, answer, question_id}] coco_karpathy_train.json
"""

import re
from collections.abc import Mapping
from typing import Any

from blip2.data import places
from blip2.data.faults import Fault
from blip2.data.images_folder import find_images
from blip2.data.json_stream import elements
from blip2.data.pictures import FilePictures
from blip2.data.records import NO_PICTURE, ByImage
from blip2.data.source import Source
from blip2.data.splits import choose_split, refuse_split
from blip2.data.texts import as_text, as_texts, make_question
from blip2.errors import BadData

YEAR_FOLDER = re.compile(r"(?:train|val|test)\d{4}")
FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "Images")
_JOINED = {"restval": "train"}  # the part of COCO's val2014 that Karpathy's split adds to training
_NAMES_TRIED = 20


def open_coco(place: str, *, images: str | None = None, split: str | None = None, layout: str = "coco") -> Source:
    """COCO's or NoCaps's captions; pictures are looked for in train2014, val2014, ... as the file is named.

    Raises:
        BadData: the file is of another form, or has no captions.
    """
    refuse_split(place, layout, split)
    names: dict[Any, tuple[str, str]] = {}
    captions: dict[Any, list[str]] = {}
    keys: dict[str | None, None] = {}
    for key, value in elements(place):
        keys[key] = None
        if key == "images" and isinstance(value, Mapping):
            names[value.get("id")] = (str(value.get("file_name") or ""), str(value.get("domain") or ""))
        elif key == "annotations" and isinstance(value, Mapping):
            captions.setdefault(value.get("image_id"), []).extend(as_texts(value.get("caption")))
    if not names or not any(captions.values()):
        missing = "captions" if names else "images"
        raise wrong_form(place, layout, '{"images": [...], "annotations": [{"image_id", "caption"}]}', keys, missing)
    by_image = ByImage(layout)
    for number, (name, domain) in names.items():
        notes: dict[str, Any] = {"style": domain} if domain else {}
        by_image.add(name or f"{NO_PICTURE}{number}", captions.pop(number, ()), id=as_text(number), **notes)
    reason = "has captions of an image that it does not list"
    faults = [Fault(as_text(number), places.shown(place), reason) for number in captions]
    return _source(place, images, by_image, YEAR_FOLDER.findall(places.name_of(place)), faults)


def open_nocaps(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """NoCaps; as COCO."""
    return open_coco(place, images=images, split=split, layout="nocaps")


def open_karpathy(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """One split of Karpathy's: train (which restval joins), val or test; `train` if none is asked for.

    Raises:
        BadData: the file is of another form.
        MissingFile: no such split.
    """
    by_split: dict[str, ByImage] = {}
    source, keys = places.name_of(place).removeprefix("dataset_").removesuffix(".json"), {}
    for key, value in elements(place):
        keys[key] = None
        if key != "images" or not isinstance(value, Mapping) or "sentences" not in value:
            continue
        name = "/".join(str(value[part]) for part in ("filepath", "filename") if value.get(part))
        own = str(value.get("split") or "")
        number = value.get("cocoid", value.get("imgid", name))
        texts = as_texts(value["sentences"])
        for part in dict.fromkeys((own, _JOINED.get(own, own))):
            by_image = by_split.setdefault(part, ByImage(source))
            by_image.add(name or f"{NO_PICTURE}{number}", texts, id=as_text(number))
    if not by_split:
        raise wrong_form(place, "karpathy", '{"images": [{"filename", "split", "sentences"}]}', keys, "sentences")
    chosen = by_split[choose_split(place, split, by_split)]
    return _source(place, images, chosen, FLICKR_FOLDERS, [])


def open_lavis(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """A list of captions or questions, as LAVIS distributes annotations.

    Raises:
        BadData: the file is of another form.
    """
    refuse_split(place, "lavis", split)
    by_image = ByImage(places.name_of(place).removesuffix(".json"))
    faults, keys = [], {}
    for number, (key, value) in enumerate(elements(place)):
        keys[key] = None
        if not isinstance(value, Mapping) or not ({"caption", "question"} & value.keys()):
            faults.append(Fault(f"entry {number}", places.shown(place), "has neither a caption nor a question"))
            continue
        name = value.get("image")
        name = name if isinstance(name, str) else ""
        question = make_question(value.get("question"), value.get("answer"), number=value.get("question_id", ""))
        own = value.get("image_id", value.get("img_id", name))
        by_image.add(name or f"{NO_PICTURE}{number}", as_texts(value.get("caption")), question, id=as_text(own))
    if not by_image:
        expected = '[{"image", "caption"}] or [{"image", "question", "answer"}]'
        raise wrong_form(place, "lavis", expected, keys, "captions")
    return _source(place, images, by_image, FLICKR_FOLDERS, faults)


def wrong_form(place: str, layout: str, expected: str, keys: Mapping[str | None, Any], missing: str) -> BadData:
    """The error of a JSON file that is not what its layout says."""
    found = ", ".join(repr(key) for key in list(keys)[:10] if key is not None)
    told = f"an object with {found}" if found else "a list of other things" if keys else "nothing"
    return BadData(f"{places.shown(place)} has no {missing}. The layout {layout} is {expected}; this is {told}.")


def _source(place: str, images: str | None, by_image: ByImage, hints: Any, faults: list[Fault]) -> Source:
    folder = find_images(places.folder_of(place), images, by_image.names(_NAMES_TRIED), hints)
    return Source(place, by_image.records(), FilePictures(folder), faults)
