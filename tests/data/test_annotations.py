"""The annotation files of captioning and question sets, written tiny as they are distributed."""

import json

import pytest

from blip2.data.layouts import open_source
from blip2.data.sample import Question
from blip2.errors import BadData, BadSample, MissingFile
from tests.data.written import put, put_json, told

COCO = {
    "info": {"year": 2014},
    "images": [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg", "height": 16, "width": 24},
        {"id": 73, "file_name": "COCO_val2014_000000000073.jpg"},
        {"id": 9, "file_name": "COCO_val2014_000000000009.jpg"},
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 42, "id": 1, "caption": "A cat on a mat."},
        {"image_id": 73, "id": 2, "caption": "A motorcycle.\n"},
        {"image_id": 42, "id": 3, "caption": "The cat sits."},
        {"image_id": 500, "id": 4, "caption": "Of nothing."},
    ],
}


@pytest.mark.parametrize("prefix", ["", "coco:"])
@pytest.mark.parametrize("images", ["val2014", "images/val2014", "elsewhere"])
def test_coco_captions(tmp_path, prefix, images):
    place = put_json(tmp_path / "annotations" / "captions_val2014.json", COCO)
    data = put(tmp_path, f"{images}/COCO_val2014_000000000042.jpg")
    given = str(tmp_path / images) if images == "elsewhere" else None
    source = open_source(f"{prefix}{place}", images=given)
    assert told(source) == [("42", ("A cat on a mat.", "The cat sits.")), ("73", ("A motorcycle.",)), ("9", ())]
    assert source[0].image == data and source.name == f"coco:{place}"
    assert [fault.sample for fault in source.faults] == ["500"]
    with pytest.raises(BadSample, match=r"COCO_val2014_000000000073\.jpg does not exist"):
        source[1]
    with pytest.raises(BadSample, match="has no caption"):
        source[2]


def test_nocaps_keeps_the_domain(tmp_path):
    images = [{"id": 0, "file_name": "0013ea.jpg", "domain": "near-domain", "open_images_id": "0013ea"}]
    value = {"images": images, "annotations": [{"image_id": 0, "caption": "A baby."}]}
    put(tmp_path, "0013ea.jpg")
    place = put_json(tmp_path / "nocaps_val_4500_captions.json", value)
    (sample,) = open_source(str(place))
    assert (sample.style, sample.source, sample.captions) == ("near-domain", "nocaps", ("A baby.",))


def karpathy(filepath):
    def image(number, split):
        named = {"filename": f"{number}.jpg", "split": split, "imgid": number} | filepath
        return named | {"sentences": [{"raw": f"caption {number}.", "tokens": ["caption"]}, {"raw": "again"}]}

    return {"images": [image(*pair) for pair in enumerate(("train", "restval", "val", "test"))], "dataset": "coco"}


@pytest.mark.parametrize(
    ("split", "ids"), [(None, ["0", "1"]), ("train", ["0", "1"]), ("restval", ["1"]), ("val", ["2"]), ("test", ["3"])]
)
def test_karpathy_splits_where_restval_joins_train(tmp_path, split, ids):
    place = put_json(tmp_path / "dataset_coco.json", karpathy({"filepath": "val2014"}))
    for number in range(4):
        put(tmp_path / "images", f"val2014/{number}.jpg", number)
    source = open_source(str(place), split=split)
    assert [name for name, _ in told(source)] == ids and source[0].image
    assert source[0].captions == (f"caption {ids[0]}.", "again")


def test_karpathy_of_flickr_has_no_folders_and_an_unknown_split_is_refused(tmp_path):
    place = put_json(tmp_path / "dataset_flickr30k.json", karpathy({}))
    put(tmp_path, "flickr30k-images/2.jpg")
    (sample,) = open_source(f"karpathy:{place}", split="val")
    assert sample.image and sample.source == "flickr30k"
    with pytest.raises(MissingFile, match="no split 'dev'; it has train, restval, val, test"):
        open_source(f"karpathy:{place}", split="dev")


def test_lavis_captions_and_questions(tmp_path):
    value = [
        {"image": "val2014/a.jpg", "caption": "A cat.", "image_id": "coco_1"},
        {"image": "val2014/b.jpg", "caption": ["A dog.", "It barks."], "image_id": "coco_2"},
        {"image": "val2014/a.jpg", "caption": "A pet.", "image_id": "coco_1"},
        {"instance_id": "7"},
    ]
    put(tmp_path, "val2014/a.jpg")
    source = open_source(str(put_json(tmp_path / "coco_karpathy_train.json", value)))
    assert told(source) == [("coco_1", ("A cat.", "A pet.")), ("coco_2", ("A dog.", "It barks."))]
    assert source[0].image and [fault.sample for fault in source.faults] == ["entry 3"]
    asked = [{"image": "val2014/a.jpg", "question": "What?", "answer": ["cat", "cat", "dog"], "question_id": 5}]
    (sample,) = open_source(str(put_json(tmp_path / "vqa_train.json", asked)))
    assert sample.questions == (Question("What?", "cat", "", ("cat", "cat", "dog"), (), "5"),)


def test_visual_genome_regions_and_questions(tmp_path):
    put(tmp_path, "VG_100K_2/7.jpg", 7)
    put(tmp_path, "VG_100K/1.jpg", 1)
    regions = [
        {"id": 7, "regions": [{"phrase": "the clock is green", "x": 1}, {"phrase": "a shade"}]},
        {"id": 1, "regions": [{"phrase": "a tree"}]},
    ]
    source = open_source(str(put_json(tmp_path / "region_descriptions.json", regions)))
    assert told(source) == [("7", ("the clock is green", "a shade")), ("1", ("a tree",))]
    assert len({sample.image for sample in source}) == 2
    qas = [{"id": 1, "qas": [{"question": "Where?", "answer": "Here.", "qa_id": 986, "image_id": 1}, "odd"]}]
    (sample,) = open_source(f"visual_genome:{put_json(tmp_path / 'question_answers.json', qas)}")
    assert sample.questions == (Question("Where?", "Here.", "", (), (), "986"),)


def test_flickr30k_as_it_is_distributed(tmp_path):
    put(tmp_path, "flickr30k-images/1.jpg")
    (tmp_path / "results_20130124.token").write_text(
        "1.jpg#0\tTwo young guys .\nno form\n1.jpg#1\tTwo men\n2.jpg#0\tA tab\tin\n"
    )
    source = open_source(str(tmp_path / "results_20130124.token"))
    assert told(source) == [("1.jpg", ("Two young guys .", "Two men")), ("2.jpg", ("A tab in",))]
    assert source[0].image and [fault.sample for fault in source.faults] == ["line 2"]
    (tmp_path / "flickr_annotations_30k.csv").write_text(
        'raw,split,filename\n"[""a"", ""b""]",test,1.jpg\n"[""c""]",train,2.jpg\n'
    )
    (sample,) = open_source(f"flickr30k:{tmp_path / 'flickr_annotations_30k.csv'}", split="test")
    assert sample.captions == ("a", "b") and sample.image


def write_vqa(folder, *, year="val2014"):
    people = ["yes"] * 3 + ["no"] * 6 + ["maybe"]
    questions = {
        "task_type": "Open-Ended",
        "data_subtype": year,
        "questions": [
            {"image_id": 42, "question": "Is it a cat?", "question_id": 42000},
            {"image_id": 42, "question": "How many?", "question_id": 42001},
            {"image_id": 73, "question": "Why?", "question_id": 73000},
        ],
    }
    annotations = {
        "annotations": [
            {
                "question_id": 42000,
                "answers": [{"answer": said, "answer_id": n} for n, said in enumerate(people)],
                "answer_type": "yes/no",
            },
            {"question_id": 42001, "answers": [{"answer": "2"}] * 10, "answer_type": "number"},
        ]
    }
    put_json(folder / f"v2_OpenEnded_mscoco_{year}_questions.json", questions)
    put_json(folder / f"v2_mscoco_{year}_annotations.json", annotations)
    return folder / f"v2_OpenEnded_mscoco_{year}_questions.json", folder / f"v2_mscoco_{year}_annotations.json"


@pytest.mark.parametrize("form", ["{0}", "vqa:{0},{1}", "okvqa:{0}"])
@pytest.mark.parametrize("name", ["val2014/COCO_val2014_000000000042.jpg", "val2014/000000000042.jpg"])
def test_vqa_with_ten_answers(tmp_path, form, name):
    files = write_vqa(tmp_path / "vqa")
    put(tmp_path, name)
    source = open_source(form.format(*files))
    (sample,) = source
    yes_or_no, number = sample.questions
    assert sample.id == "42" and sample.image
    assert (yes_or_no.answer, yes_or_no.kind, yes_or_no.id) == ("no", "yes/no", "42000")
    assert yes_or_no.answers == ("yes",) * 3 + ("no",) * 6 + ("maybe",)
    assert (number.answer, number.answers) == ("2", ("2",) * 10)
    assert [fault.sample for fault in source.faults] == ["question 73000"]


def test_questions_without_annotations_are_refused_but_those_of_a_test_set(tmp_path):
    questions, annotations = write_vqa(tmp_path)
    annotations.unlink()
    with pytest.raises(
        MissingFile, match=r"annotations .* are missing.*v2_mscoco_val2014_annotations\.json is not there"
    ):
        open_source(str(questions))
    questions, annotations = write_vqa(tmp_path, year="test2015")
    annotations.unlink()
    source = open_source(str(questions))
    assert [question.answer for sample in source.described() for question in sample.questions] == ["", "", ""]


def test_a_okvqa_has_choices_and_direct_answers(tmp_path):
    value = [
        {
            "split": "train",
            "image_id": 299207,
            "question_id": "22MexN",
            "question": "What is the man by the bags awaiting?",
            "choices": ["skateboarder", "train", "delivery", "cab"],
            "correct_choice_idx": 3,
            "direct_answers": ["ride", "ride", "bus", "taxi"],
        },
        {"split": "train", "image_id": 299207, "question": "Which?", "choices": ["a", "b"], "correct_choice_idx": 1},
    ]
    put(tmp_path / "train2017", "000000299207.jpg")
    (sample,) = open_source(str(put_json(tmp_path / "aokvqa" / "aokvqa_v1p0_train.json", value)))
    first, second = sample.questions
    assert (first.answer, first.answers[-1], first.choices[3], first.id) == ("ride", "taxi", "cab", "22MexN")
    assert (second.answer, second.answers, second.choices) == ("b", (), ("a", "b"))


def test_gqa_balanced_questions(tmp_path):
    value = {
        "07333408": {
            "imageId": "2375429",
            "question": "What is on the white wall?",
            "answer": "pipe",
            "types": {"structural": "query", "semantic": "rel"},
        },
        "07333405": {"imageId": "2375429", "question": "Is that pipe red?", "answer": "no"},
    }
    put(tmp_path / "images", "2375429.jpg")
    (sample,) = open_source(str(put_json(tmp_path / "val_balanced_questions.json", value)))
    assert sample.questions == (
        Question("What is on the white wall?", "pipe", "query", (), (), "07333408"),
        Question("Is that pipe red?", "no", "", (), (), "07333405"),
    )
    assert sample.image


@pytest.mark.parametrize(
    ("layout", "value", "message"),
    [
        (
            "coco",
            {"images": [{"id": 1, "file_name": "a.jpg"}]},
            r"no captions.*layout coco is .*this is an object with 'images'",
        ),
        ("coco", [{"image": "a.jpg"}], "no images.*this is a list of other things"),
        ("karpathy", {"images": [{"filename": "a.jpg"}]}, "no sentences.*layout karpathy"),
        ("lavis", [], "no captions.*this is nothing"),
        ("vqa", {"questions": []}, "annotations .* are missing"),
        ("gqa", [{"question": "?"}], "no questions.*layout gqa"),
        ("aokvqa", {"a": 1}, "no questions.*this is an object with 'a'"),
        ("visual-genome", [{"id": 1}], "no regions"),
        (
            None,
            {"version": 1},
            r"an object with 'version', which is no annotation file that is known \(karpathy.*JSONL",
        ),
        (None, [{"url": "x", "label": 3}], "a list of objects with label, url, which is no annotation file"),
    ],
)
def test_a_file_of_another_form_says_what_was_expected_and_found(tmp_path, layout, value, message):
    place = put_json(tmp_path / "a.json", value)
    with pytest.raises((BadData, MissingFile), match=message):
        open_source(f"{layout}:{place}" if layout else str(place))


@pytest.mark.parametrize("layout", ["coco", "nocaps", "lavis", "vqa", "aokvqa", "gqa", "visual-genome"])
def test_a_split_is_refused_where_a_file_is_one_split(tmp_path, layout):
    place = put_json(tmp_path / "a.json", COCO)
    with pytest.raises(BadData, match=f"has no splits within|no splits within {tmp_path}"):
        open_source(f"{layout}:{place}", split="val")


def test_damaged_annotations_are_refused(tmp_path):
    place = tmp_path / "captions_val2014.json"
    place.write_text(json.dumps(COCO)[:-30])
    with pytest.raises(BadData, match="is not JSON, or it is cut short"):
        open_source(f"coco:{place}")
