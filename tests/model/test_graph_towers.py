"""A quantised image encoder that the library computes sees what its layers would."""

import pytest
import torch
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from blip2.model.graphs import towers
from blip2.model.graphs.taking_over import take_over
from blip2.model.quantized import Int8Linear, quantize, to_int8
from blip2.model.vision import HuggingFaceVision
from model.rounded import EXACT, near, product, whole

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"image_size": 28, "patch_size": 7}
TOWERS = {
    "eva": lambda: Blip2VisionModel(Blip2VisionConfig(**SHAPE)),
    "eva without a bias": lambda: Blip2VisionModel(Blip2VisionConfig(qkv_bias=False, **SHAPE)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE)),
    "clip with gelu": lambda: CLIPVisionModel(CLIPVisionConfig(hidden_act="gelu", **SHAPE)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE)),
}


def tower(name):
    torch.manual_seed(0)
    network = TOWERS[name]().eval().requires_grad_(False)
    quantize(network, "int8", rounds_inputs=True)
    return network


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_sees_what_its_layers_would(name):
    """Pictures of other sizes too, and alone as together."""
    network = tower(name)
    expected = HuggingFaceVision(whole(network), name="t", drop_last_layer=False)
    assert take_over(network)
    encoder = HuggingFaceVision(network, name="t", drop_last_layer=False)
    for size in ((28, 28), (14, 42), (28, 28)):
        pictures = torch.randn(3, 3, *size)
        features = encoder(pictures)
        near(features, expected(pictures), EXACT)
        assert torch.equal(encoder(pictures[1:2])[0], features[1])


def test_a_tower_is_cut_where_its_weights_are_many(monkeypatch):
    pictures, features = torch.randn(2, 3, 28, 28), []
    for size in (towers.AT_ONCE, 1):
        monkeypatch.setattr(towers, "AT_ONCE", size)
        network = tower("eva")
        assert take_over(network)
        features.append(HuggingFaceVision(network, name="t", drop_last_layer=False)(pictures))
    assert torch.equal(*features)


def test_towers_that_are_not_written_down_keep_their_layers():
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
    network = Dinov2Model(Dinov2Config(**shape)).eval().requires_grad_(False)
    quantize(network, "int8", rounds_inputs=True)
    assert not take_over(network)
    assert not take_over(TOWERS["clip"]().eval())
    relu = CLIPVisionModel(CLIPVisionConfig(hidden_act="relu", **SHAPE)).eval().requires_grad_(False)
    quantize(relu, "int8", rounds_inputs=True)
    assert not take_over(relu)


def test_no_rows_give_no_rows():
    torch.manual_seed(0)
    alone = product(Int8Linear(*to_int8(torch.randn(8, 16)), None))
    assert alone(torch.zeros(0, 16)).shape == (0, 8)
    network = tower("eva")
    assert take_over(network)
    assert HuggingFaceVision(network, name="t", drop_last_layer=False)(torch.zeros(0, 3, 28, 28)).shape == (0, 17, 64)
