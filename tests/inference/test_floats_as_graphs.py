"""A small Llama in float32 is left to LiteRT where that is faster, and says the same; where it cannot be, it is not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blip2
from blip2.checkpoints.native import FrozenPart
from blip2.inference import loading
from blip2.model.efficientnet import EfficientNetLite, EfficientNetTokens
from blip2.model.graphs.decoders import Layers

from .tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("floats")).model


@pytest.fixture(autouse=True)
def on_avx2(monkeypatch):
    """Whatever this machine has."""
    monkeypatch.setattr(loading, "is_avx2", lambda: True)


def is_taken_over(model):
    return isinstance(model.generator.language_model.model.model.layers[0], Layers)


def test_it_says_the_same(folder, images, monkeypatch):
    taken = blip2.load(folder)
    assert is_taken_over(taken) and taken.generator.language_model.replay is not None
    monkeypatch.setattr(loading, "MOST_FLOATS", 0)
    plain = blip2.load(folder, drafts=False)
    assert not is_taken_over(plain)
    for options in ({}, {"max_new_tokens": 1}, {"min_new_tokens": 20}, {"max_new_tokens": 90}, {"num_beams": 3}):
        assert taken.caption(images, **options) == plain.caption(images, **options)
        for image in images:
            assert taken.caption(image, best_of=1, **options) == plain.caption(image, best_of=1, **options)
            assert taken.ask(image, "what is this ?", **options) == plain.ask(image, "what is this ?", **options)
    found, expected = (model.rank_answers(images, "what is this ?", ["a cat", "a red cup"]) for model in (taken, plain))
    for some, others in zip(found, expected, strict=True):
        assert [one.text for one in some] == [one.text for one in others]
        assert [one.share for one in some] == pytest.approx([one.share for one in others], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_avx2", lambda: False),
        ("MOST_FLOATS", 1000),
        ("shutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=1000))),
    ],
    ids=["another processor", "too large", "no room"],
)
def test_otherwise_it_stays(folder, images, monkeypatch, name, value):
    monkeypatch.setattr(loading, name, value)
    model = blip2.load(folder)
    assert not is_taken_over(model)
    assert model.caption(images[0])


def test_another_dtype_or_family_stays(folder, tmp_path):
    assert not is_taken_over(blip2.load(folder, dtype=torch.bfloat16))
    t5 = blip2.load(make_tiny_model(tmp_path, decoder_only=False).model).generator.language_model
    assert t5.attends_apart is None and t5.replay is None


def test_stages_of_efficientnet_are_left_to_it_where_there_is_room(monkeypatch):
    network = EfficientNetLite(0)
    network.fold_batch_norms()
    encoder = EfficientNetTokens(network, name="random", image_size=64)
    monkeypatch.setattr(loading.frozen, "load_vision", lambda *args, **options: encoder)
    settings = SimpleNamespace(vision=FrozenPart("random"), image_size=64)
    loader = loading._Loader(Path(), settings, torch.device("cpu"), torch.float32, None, None, drafts=True)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(loading, "is_avx2", lambda: False)
        assert loader.vision_model().faster is None
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
        assert loader.vision_model().faster is None
    assert loader.vision_model().faster is not None
