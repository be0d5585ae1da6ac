"""Stage 1 gives the numbers of the original code: losses, features and gradients, from a file LAVIS itself made.

benchmarks/lavis_golden.py made it (LAVIS 506965b, transformers 4.33.2, torch 2.13, float32 on a CPU) and tells how.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2.checkpoints.names import Names, unnamed
from blip2.model.config import QFormerConfig
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.training.stage1 import Stage1Batch, Stage1Step

GOLDEN = Path(__file__).parent / "golden" / "lavis_stage1.safetensors"
CLOSE = {"atol": 1e-5, "rtol": 0}
# Not of the bridge: a buffer, and the second name of tied weights.
DROPPED = {
    "Qformer.bert.embeddings.position_ids",
    "Qformer.cls.predictions.decoder.weight",
    "Qformer.cls.predictions.decoder.bias",
}
DEC = 59


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def model(golden):
    """Our model with LAVIS's weights."""
    state = {name.removeprefix("model."): tensor for name, tensor in golden.items() if name.startswith("model.")}
    assert set(unnamed(state, "lavis", "blip2")) <= DROPPED
    config = QFormerConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=24,
        num_query_tokens=5,
        max_position_embeddings=20,
        embed_dim=16,
    )
    model = Blip2Stage1(None, config)
    model.load_state_dict(Names("lavis", "blip2").rename(state))  # strict: nothing is lacking, nothing left over
    return model.eval()


@pytest.fixture(scope="module")
def losses(golden, model):
    """What our step makes of LAVIS's inputs, with the hardest negatives; gradients stay on the model."""
    step = Stage1Step(model, bos_id=DEC, negatives="hardest").eval()
    text = Text(golden["input_ids"], golden["attention_mask"])
    found = step(Stage1Batch(golden["images"], text, groups=torch.arange(len(golden["images"]))))
    found["loss"].backward()
    return found


@pytest.mark.parametrize("name", ["itc", "itm", "itg"])
def test_the_losses_are_lavis(golden, losses, name):
    torch.testing.assert_close(losses[name], golden[name], **CLOSE)  # worst seen: 5e-7


def test_their_sum_has_lavis_gradients(golden, model, losses):
    way, ours = Names("lavis", "blip2"), dict(model.named_parameters())
    compared = [name for name in golden if name.startswith("gradient.")]
    assert len(compared) == 6
    for name in compared:
        gradient = ours[way.translate(name.removeprefix("gradient."))].grad
        torch.testing.assert_close(gradient, golden[name], **CLOSE)


@torch.inference_mode()
def test_the_features_of_contrast_are_lavis(golden, model):
    text = Text(golden["input_ids"], golden["attention_mask"])
    torch.testing.assert_close(model.embed_images(golden["images"]), golden["image_embeds"], **CLOSE)
    torch.testing.assert_close(model.embed_texts(text), golden["text_embeds"], **CLOSE)


def test_names_go_there_and_back(golden, model):
    there, back = Names("blip2", "lavis"), Names("lavis", "blip2")
    for name in model.state_dict():
        assert f"model.{there.translate(name)}" in golden
        assert back.translate(there.translate(name)) == name
