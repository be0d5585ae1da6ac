"""A tiny model, loaded, and a tiny data set of the open set's splits, laid out as the real one."""

import io

import numpy as np
import pytest
from inference.tiny_model import make_tiny_model
from PIL import Image

import blip2
from blip2.data.sample import Question, Sample
from blip2.data.shards import write_manifest, write_split

CONCEPTS = ("cat", "red cup", "star", "blue star", "two cats", "green cup")
COLOURS = ("red", "blue", "green")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders of a tiny model with both parts."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model(tiny):
    """That model, loaded."""
    return blip2.load(tiny.model)


@pytest.fixture(scope="session")
def open_pairs(tmp_path_factory):
    """The folder of a data set with all splits that are evaluated, a few pictures each."""
    folder = tmp_path_factory.mktemp("open-pairs")
    splits = {
        "train_pairs": _pairs("noto", CONCEPTS[:4]) + _pairs("flat", CONCEPTS[:4]),
        "train_styles": _pairs("openmoji", CONCEPTS[:4]),
        "held_out_concepts": _pairs("noto", CONCEPTS[4:]) + _pairs("flat", CONCEPTS[4:]),
        "held_out_style": _pairs("twemoji", CONCEPTS),
        "train_scenes": _scenes("train_scenes", 6),
        "new_scenes": _scenes("new_scenes", 6),
        "new_noun_pairs": _scenes("new_noun_pairs", 4),
        "easy_vqa_train": _scenes("easy_vqa_train", 4),
        "easy_vqa_test": _scenes("easy_vqa_test", 4),
    }
    written = {split: write_split(folder, split, samples) for split, samples in splits.items()}
    write_manifest(folder, "open-pairs", written)
    return folder


def _pairs(style, concepts):
    return [
        Sample(
            id=f"{style}/{number}",
            image=_picture(f"{concept}{style}"),
            captions=(concept,),
            source="emoji",
            style=style,
            concept=concept,
        )
        for number, concept in enumerate(concepts)
    ]


def _scenes(split, count):
    """Scenes that are asked for a colour and a number, each answer as frequent as the others."""
    return [
        Sample(
            id=f"{split}/{number}",
            image=_picture(f"{split}{number}"),
            captions=(f"a {COLOURS[number % 3]} star, number {number}",),
            questions=(
                Question("What colour is the star?", COLOURS[number % 3], "colour"),
                Question("How many cats are there?", ("one", "two")[number % 2], "count"),
                Question(f"Is there a {COLOURS[number % 3]} cup?", "yes", "exists"),
            ),
            source="scenes",
        )
        for number in range(count)
    ]


def _picture(name):
    seed = np.frombuffer(name.encode(), np.uint8)
    noise = np.random.default_rng(list(seed)).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()
