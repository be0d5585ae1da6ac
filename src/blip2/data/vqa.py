"""Questions about pictures in the JSON files of their data sets. One sample is one picture with all its questions.

    vqa      {"questions": [{question_id, image_id, question}], "data_subtype": "train2014"}  and
             {"annotations": [{question_id, answers: [{answer}], answer_type}]}               VQAv2, OK-VQA
    aokvqa   [{image_id, question_id, question, choices, correct_choice_idx, direct_answers}]
    gqa      {QUESTION ID: {imageId, question, answer, types}}

The ten answers of VQAv2 stay ten; `answer` is the most frequent.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from blip2.data import places
from blip2.data.coco import YEAR_FOLDER, wrong_form
from blip2.data.faults import Fault
from blip2.data.images_folder import find_images, pick
from blip2.data.json_stream import elements
from blip2.data.pictures import FilePictures
from blip2.data.records import ByImage
from blip2.data.source import Source
from blip2.data.splits import refuse_split
from blip2.data.texts import as_text, as_texts, make_question
from blip2.errors import MissingFile

_BETWEEN = "\x1f"  # joins the answers of a question, which so cost one string and not ten
_QUESTIONS_NAME = re.compile(r"^(v2_)?(?:OpenEnded|MultipleChoice)_(mscoco_.+)_questions\.json$")
_NAMES_TRIED = 20


def open_vqa(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """VQAv2 or OK-VQA.

    Args:
        place: questions.json,annotations.json; or the questions alone, whose annotations then lie beside them under the
            usual name, or do not exist, as those of the test sets.

    Raises:
        MissingFile: there are no annotations.
        BadData: a file is of another form.
    """
    refuse_split(place, "vqa", split)
    questions, annotations = _two_files(place)
    answers = _answers(annotations) if annotations else {}
    by_image, faults, keys = ByImage("vqa"), [], {}
    subtype = ""
    for key, value in elements(questions):
        keys[key] = None
        if key == "data_subtype" and isinstance(value, str):
            subtype = value
        if key != "questions" or not isinstance(value, Mapping):
            continue
        number = value.get("question_id")
        kind, said = answers.get(number, ("", ""))
        if answers and number not in answers:
            faults.append(Fault(f"question {number}", places.shown(questions), "has a question without an annotation"))
            continue
        said = said.split(_BETWEEN) if said else []
        question = make_question(value.get("question"), said, kind=kind, number=number)
        by_image.add(as_text(value.get("image_id")), (), question)
    if not by_image:
        raise wrong_form(place, "vqa", '{"questions": [...]},{"annotations": [...]}', keys, "questions")
    years = [subtype] if YEAR_FOLDER.fullmatch(subtype) else YEAR_FOLDER.findall(places.name_of(questions))
    return coco_source(questions, images, by_image, years, faults)


def open_aokvqa(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """A-OKVQA: choices and ten direct answers; without either answer where the set keeps them to itself."""
    refuse_split(place, "aokvqa", split)
    by_image, keys, splits = ByImage("aokvqa"), {}, {}
    for key, value in elements(place):
        keys[key] = None
        if not isinstance(value, Mapping) or "image_id" not in value:
            continue
        splits[str(value.get("split"))] = None
        said, choices = as_texts(value.get("direct_answers")), as_texts(value.get("choices"))
        question = make_question(value.get("question"), said, choices=choices, number=value.get("question_id"))
        right = value.get("correct_choice_idx")
        if question and not said and isinstance(right, int) and 0 <= right < len(choices):
            question = replace(question, answer=choices[right])
        by_image.add(as_text(value["image_id"]), (), question)
    if not by_image:
        raise wrong_form(place, "aokvqa", '[{"image_id", "question", "choices", "direct_answers"}]', keys, "questions")
    return coco_source(place, images, by_image, [f"{name}2017" for name in splits], [])


def open_gqa(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """GQA's questions; the kind of a question is its structural type: query, verify, logical, choose, compare."""
    refuse_split(place, "gqa", split)
    by_image, keys = ByImage("gqa"), {}
    for key, value in elements(place):
        if len(keys) < 100:
            keys[key] = None
        if key is None or not isinstance(value, Mapping) or "imageId" not in value:
            continue
        types = value.get("types")
        kind = types.get("structural") if isinstance(types, Mapping) else ""
        question = make_question(value.get("question"), value.get("answer"), kind=kind, number=key)
        by_image.add(as_text(value["imageId"]), (), question)
    if not by_image:
        raise wrong_form(place, "gqa", '{"QUESTION ID": {"imageId", "question", "answer"}}', keys, "questions")
    names = [f"{number}.jpg" for number in by_image.names(_NAMES_TRIED)]
    folder = find_images(places.folder_of(place), images, names, ["images", "allImages/images"])
    return Source(place, by_image.records(lambda number: f"{number}.jpg"), FilePictures(folder), [])


def coco_source(
    place: str, images: str | None, by_image: ByImage, years: Sequence[str], faults: Sequence[Fault]
) -> Source:
    """A source of COCO's pictures known by number, named as in 2014 (COCO_val2014_000000000042.jpg) or as in 2017."""
    patterns = [f"COCO_{year}_{{}}.jpg" for year in years] + ["{}.jpg"]

    def choices(number: str) -> list[str]:
        return [pattern.format(number.zfill(12)) for pattern in patterns]

    tried = [name for number in by_image.names(_NAMES_TRIED) for name in choices(number)]
    folder = find_images(places.folder_of(place), images, tried, years)
    picked = next((choices(number) for number in by_image.names(1)), [""])
    pattern = patterns[picked.index(pick(folder, picked))]
    # the first picture tells how all are named; where that one is missing, each is asked
    is_certain = pick(folder, picked[::-1]) == pick(folder, picked)

    def file_of(number: str) -> str:
        return pattern.format(number.zfill(12)) if is_certain else pick(folder, choices(number))

    return Source(place, by_image.records(file_of), FilePictures(folder), faults)


def _two_files(place: str) -> tuple[str, str | None]:
    if not places.is_file(place) and "," in place:
        questions, annotations = place.split(",", 1)
        return questions.strip(), annotations.strip()
    named = _QUESTIONS_NAME.match(places.name_of(place))
    beside = f"{named[1] or ''}{named[2]}_annotations.json" if named else ""
    folder = places.folder_of(place)
    if beside and places.is_file(places.join(folder, beside)):
        return place, places.join(folder, beside)
    if "test" in places.name_of(place):
        return place, None
    told = f"{places.join(folder, beside)} is not there" if beside else "their file has no usual name"
    raise MissingFile(
        f"The annotations of {places.shown(place)} are missing: {told}. Name both: vqa:questions.json,annotations.json."
    )


def _answers(place: str) -> dict[Any, tuple[str, str]]:
    """Question id -> kind, and all answers in one string."""
    found, keys = {}, {}
    for key, value in elements(place):
        keys[key] = None
        if key != "annotations" or not isinstance(value, Mapping):
            continue
        said = as_texts(value.get("answers")) or as_texts(value.get("multiple_choice_answer"))
        kind = as_text(value.get("answer_type")) or as_text(value.get("question_type"))
        found[value.get("question_id")] = (kind, _BETWEEN.join(said))
    if not found:
        raise wrong_form(place, "vqa", '{"annotations": [{"question_id", "answers"}]}', keys, "annotations")
    return found
