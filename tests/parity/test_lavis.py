"""Both stages give the numbers of the original code: losses, features and gradients, from files LAVIS itself made.

benchmarks/lavis_golden.py made them (LAVIS 506965b, transformers 4.33.2, torch 2.13, float32 on a CPU) and tells how.
The largest differences are in docs/parity.md.
"""

import pytest
import torch

from blip2.checkpoints.names import Names
from blip2.model.stage1 import Text

from . import lavis_golden

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def loaded():
    return lavis_golden.load()


@pytest.fixture(scope="module")
def losses(loaded):
    return lavis_golden.losses(*loaded)


@pytest.mark.parametrize("name", ["itc", "itm", "itg"])
def test_the_losses_are_lavis(loaded, losses, name):
    torch.testing.assert_close(losses[name], loaded[0][name], **CLOSE)


def test_their_sum_has_lavis_gradients(loaded, losses):
    found = lavis_golden.gradients(*loaded)
    assert len(found) == 6
    for name, gradient in found.items():
        expected = loaded[0][f"gradient.{name}"]
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)  # that of the temperature is 16


@torch.inference_mode()
def test_the_features_of_contrast_are_lavis(loaded):
    golden, model = loaded
    text = Text(golden["input_ids"], golden["attention_mask"])
    torch.testing.assert_close(model.embed_images(golden["images"]), golden["image_embeds"], **CLOSE)
    torch.testing.assert_close(model.embed_texts(text), golden["text_embeds"], **CLOSE)


def test_names_go_there_and_back(loaded):
    golden, model = loaded
    there, back = Names("blip2", "lavis"), Names("lavis", "blip2")
    for name in model.state_dict():
        assert f"model.{there.translate(name)}" in golden
        assert back.translate(there.translate(name)) == name


@pytest.mark.parametrize("name", lavis_golden.SPEAKERS)
def test_the_loss_through_the_language_model_is_lavis_and_so_are_its_gradients(name):
    golden, loss, model = lavis_golden.speaker_loss(name)
    torch.testing.assert_close(loss, golden["loss"], **CLOSE)
    (projection,) = [k for k in golden if k.startswith("gradient.") and k != "gradient.query_tokens"]
    for ours, theirs in (("query_tokens", "gradient.query_tokens"), ("language_projection.weight", projection)):
        gradient = model.get_parameter(ours).grad
        torch.testing.assert_close(gradient, golden[theirs], atol=2e-6, rtol=1e-4)  # T5's are up to 0.6
        assert gradient.abs().max() > 1e-4
