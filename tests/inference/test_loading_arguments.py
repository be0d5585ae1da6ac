"""What `load` is given wrongly is told, and nothing is loaded as something else."""

import pytest
import torch

import blip2
from blip2.errors import UserError
from inference.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny")).model


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"parts": "stage1"}, "Give a list of: stage1, generation"),
        ({"parts": ["stage2"]}, "Give a list of: stage1, generation"),
        ({"quantize": "int3"}, "Give one of int8, int4, or None"),
    ],
)
def test_an_argument_that_means_nothing_is_told(tiny, given, told):
    with pytest.raises(UserError, match=told):
        blip2.load(tiny, **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(tiny):
    with pytest.raises(UserError, match="finds no GPU"):
        blip2.load(tiny, device="cuda")


def test_one_where_many_are_wanted_is_told_and_many_where_one_is(tiny):
    model = blip2.load(tiny)
    image = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    for ask in (
        lambda: model.ask(image, "what ?", answers="yes"),
        lambda: model.rank_answers(image, "what ?", ["yes", "no"]),
        lambda: model.match([image, image], ["a cat"]),
        lambda: model.chat([image, image]),
        lambda: model.ask(image, 5),
        lambda: model.ask(image, None),
    ):
        with pytest.raises(UserError):
            ask()
