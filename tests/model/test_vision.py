"""Image encoders: Hugging Face towers give the states before their last layer, at any size, and never learn."""

import pytest
import torch
import transformers
from torch import nn

from blip2.errors import UnknownModel
from blip2.model.vision import TOWERS, HuggingFaceConvNext, HuggingFaceVision, encoder_layers

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}

# tower -> (config class, patch size, tokens besides patches)
FAMILIES = {
    "CLIPVisionModel": (transformers.CLIPVisionConfig, 8, 1),
    "Blip2VisionModel": (transformers.Blip2VisionConfig, 8, 1),
    "InstructBlipVisionModel": (transformers.InstructBlipVisionConfig, 8, 1),
    "SiglipVisionModel": (transformers.SiglipVisionConfig, 8, 0),
    "Dinov2Model": (transformers.Dinov2Config, 8, 1),
    "Dinov2WithRegistersModel": (transformers.Dinov2WithRegistersConfig, 8, 5),
    "ViTModel": (transformers.ViTConfig, 8, 1),
}


def tiny_tower(family: str) -> nn.Module:
    """A tower of three layers with random weights, norms included, so that a norm applied by mistake shows."""
    torch.manual_seed(0)
    config_class, patch_size, _ = FAMILIES[family]
    tower = getattr(transformers, family)(config_class(patch_size=patch_size, **SHAPE)).eval()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.3)
    return tower


def hidden_states(tower: nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What transformers itself records: the embeddings, then each layer's output."""
    with torch.no_grad():
        return tower(pixel_values, output_hidden_states=True).hidden_states


def test_every_tower_of_the_table_is_tested():
    assert set(FAMILIES) == set(TOWERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_states_before_the_layer_the_paper_removes(family):
    tower, pixel_values = tiny_tower(family), torch.randn(2, 3, 32, 32)
    expected = hidden_states(tower, pixel_values)[-2 if TOWERS[family].drop_last_layer else -1]
    image_features = HuggingFaceVision(tower, name="tiny")(pixel_values)
    torch.testing.assert_close(image_features, expected, atol=1e-5, rtol=1e-5)


def test_only_blip2s_own_tower_keeps_its_last_layer_unasked():
    kept = {family: len(encoder_layers(HuggingFaceVision(tiny_tower(family), name="x").network)) for family in FAMILIES}
    own = ("Blip2VisionModel", "InstructBlipVisionModel")
    assert kept == {family: 3 if family in own else 2 for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_kept_on_request_and_no_norm_follows_it(family):
    tower, pixel_values = tiny_tower(family), torch.randn(1, 3, 32, 32)
    expected = hidden_states(tower, pixel_values)[-1]
    image_features = HuggingFaceVision(tower, name="tiny", drop_last_layer=False)(pixel_values)
    torch.testing.assert_close(image_features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(48, 48), (16, 40), (32, 64)])
def test_pictures_of_any_size_and_shape_are_accepted(family, height, width):
    encoder = HuggingFaceVision(tiny_tower(family), name="tiny", image_size=48)
    image_features = encoder(torch.randn(2, 3, height, width))
    assert image_features.shape == (2, height // 8 * (width // 8) + FAMILIES[family][2], encoder.width)
    assert encoder.image_size == 48


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_stays_frozen_and_in_evaluation_mode(family):
    encoder = HuggingFaceVision(tiny_tower(family), name="tiny")
    around = nn.Sequential(encoder).train()
    assert around.training and not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 32, 32, requires_grad=True)).requires_grad


def test_a_batch_of_one_equals_its_row_in_a_batch():
    encoder, pixel_values = HuggingFaceVision(tiny_tower("CLIPVisionModel"), name="tiny"), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(encoder(pixel_values[1:2]), encoder(pixel_values)[1:2], atol=1e-6, rtol=1e-5)


def test_features_have_the_dtype_of_the_weights():
    encoder = HuggingFaceVision(tiny_tower("CLIPVisionModel").to(torch.bfloat16), name="tiny")
    assert encoder(torch.randn(1, 3, 48, 48)).dtype == torch.bfloat16


def test_a_network_that_is_no_vision_tower_is_refused_by_name():
    with pytest.raises(UnknownModel, match="Linear is no vision tower we can read"):
        HuggingFaceVision(nn.Linear(2, 2), name="tiny")


@pytest.mark.parametrize("version", ["ConvNext", "ConvNextV2"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (70, 45)])
def test_a_convnext_gives_the_cells_of_its_last_stage(version, height, width):
    torch.manual_seed(0)
    config = getattr(transformers, f"{version}Config")(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1], image_size=64)
    network = getattr(transformers, f"{version}Model")(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    encoder, pixel_values = HuggingFaceConvNext(network, name="tiny"), torch.randn(2, 3, height, width)
    with torch.no_grad():
        cells = network(pixel_values).last_hidden_state
    features = encoder(pixel_values)
    assert (encoder.width, encoder.image_size) == (20, 64) and features.shape == (2, cells[0, 0].numel(), 20)
    torch.testing.assert_close(features[:, 1], cells[:, :, 0, 1] if cells.shape[3] > 1 else cells[:, :, 1, 0])
    assert not any(p.requires_grad for p in encoder.parameters())
