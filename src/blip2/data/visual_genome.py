"""Visual Genome: region descriptions as captions of the whole picture, and its questions.

    region_descriptions.json  [{id, regions: [{phrase}]}]
    question_answers.json     [{id, qas: [{question, answer, qa_id}]}]

Pictures are VG_100K/ID.jpg and VG_100K_2/ID.jpg, as distributed.
"""

from collections.abc import Mapping
from typing import Any

from blip2.data import places
from blip2.data.coco import wrong_form
from blip2.data.images_folder import find_images, pick
from blip2.data.json_stream import elements
from blip2.data.pictures import FilePictures
from blip2.data.records import ByImage
from blip2.data.source import Source
from blip2.data.splits import refuse_split
from blip2.data.texts import as_text, as_texts, make_question

_NAMES_TRIED = 20


def open_visual_genome(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """Either file; all phrases of a picture are its captions, all questions its questions.

    Raises:
        BadData: the file is of another form.
    """
    refuse_split(place, "visual-genome", split)
    by_image, keys = ByImage("visual-genome"), {}
    for key, value in elements(place):
        keys[key] = None
        if not isinstance(value, Mapping) or not ({"regions", "qas"} & value.keys()):
            continue
        number = as_text(value.get("id", value.get("image_id")))
        by_image.add(number, as_texts(value.get("regions", ())))
        for asked in filter(_is_object, value.get("qas") or ()):
            question = make_question(asked.get("question"), asked.get("answer"), number=asked.get("qa_id"))
            by_image.add(number, (), question)
    if not by_image:
        expected = '[{"id", "regions": [{"phrase"}]}] or [{"id", "qas": [...]}]'
        raise wrong_form(place, "visual-genome", expected, keys, "regions")
    tried = [name for number in by_image.names(_NAMES_TRIED) for name in _choices(number)]
    folder = find_images(places.folder_of(place), images, tried)
    records = by_image.records(lambda number: pick(folder, _choices(number)))
    return Source(place, records, FilePictures(folder), [])


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _choices(number: str) -> list[str]:
    return [f"VG_100K/{number}.jpg", f"VG_100K_2/{number}.jpg", f"{number}.jpg"]
