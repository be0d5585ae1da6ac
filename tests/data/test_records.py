"""Samples kept as lines come back as they were, and a million of them cost little."""

import subprocess
import sys

import pytest

from blip2.data.records import ByImage, Records
from blip2.data.sample import Question, Sample
from blip2.data.texts import as_text, as_texts, make_question, most_frequent

FULL = Sample(
    "a/1",
    b"",
    ("one", "zwei\n🦁"),
    (Question("What?", "cat", "what", ("cat", "cat", "dog"), ("cat", "dog"), "77"), Question("Is it?", "", "")),
    ("tag",),
    "coco",
    "photo",
    "cat",
    "MIT",
)
SAMPLES = [
    ("a.jpg", FULL),
    ([3, 512, 99], Sample("b", b"", ("one",))),
    ("b\udcff.jpg", Sample("b?", b"", ())),  # a file name that is no UTF-8
    ("", Sample("c", b"", (), (Question("Why?", "so", ""),))),
    ("d", Sample("d", b"", ("x",), tags=("t", "u"), concept="cup")),
]


def test_samples_come_back_in_any_order():
    records = Records()
    for where, sample in SAMPLES:
        records.append(where, sample)
    assert list(records) == SAMPLES
    assert [records[index] for index in (4, 0, 2)] == [SAMPLES[index] for index in (4, 0, 2)]


def test_texts_of_one_picture_are_one_sample():
    by_image = ByImage("s")
    by_image.add("b.jpg", ("one",))
    by_image.add("a.jpg", ("two",), make_question("Who?", "me"), id="7")
    by_image.add("b.jpg", ("three",))
    assert [(where, sample.id, sample.captions) for where, sample in by_image.records()] == [
        ("b.jpg", "b.jpg", ("one", "three")),
        ("a.jpg", "7", ("two",)),
    ]
    assert len(by_image) == 0


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("a  cat\n", ("a cat",)),
        (["a", None, " ", "b"], ("a", "b")),
        ([{"raw": "a"}, {"raw": "b", "tokens": []}], ("a", "b")),
        ([{"answer": "no", "answer_id": 1}], ("no",)),
        ('["a", "b"]', ("a", "b")),
        ("[a] cat", ("[a] cat",)),
        ("[1, 2]", ("[1, 2]",)),
        ("[broken", ("[broken",)),
        (3, ("3",)),
        (float("nan"), ()),
        (True, ()),
        (None, ()),
        ({}, ()),
        (b"bytes", ("bytes",)),
        ("half \ud83d", ("half ?",)),
        ("[" * 5000 + "]", ("[" * 5000 + "]",)),
    ],
)
def test_cells_of_every_kind_become_texts(value, texts):
    assert as_texts(value) == texts


def test_the_answer_is_the_most_frequent_and_all_are_kept():
    question = make_question("What?", ["cat", "dog", "dog", "cat", "bird"], kind="other", number=12)
    assert question == Question("What?", "cat", "other", ("cat", "dog", "dog", "cat", "bird"), (), "12")
    assert make_question("What?", "cat") == Question("What?", "cat", "")
    assert make_question("", "cat") is None and most_frequent([]) == "" and as_text(12) == "12"


@pytest.mark.slow
def test_a_million_samples_cost_less_than_a_fifth_of_a_gigabyte():
    code = (
        "import resource\n"
        "from blip2.data.records import Records\n"
        "from blip2.data.sample import Sample\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "records = Records()\n"
        "for n in range(1_000_000):\n"
        "    caption = f'a caption of fifty letters and that is number {n}'\n"
        "    records.append(f'{n:09d}.jpg', Sample(f'{n:09d}', b'', (caption,)))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000  # kB; 125,000 measured
