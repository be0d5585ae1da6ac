"""Parts that a run may train besides the bridge: adapters and an encoder end up in the exported folder, and act."""

import pytest
import torch

import blip2
from blip2.errors import BadRecipe
from blip2.training.export import export
from blip2.training.loop import train
from blip2.training.recipe import apply_overrides

from .tiny_blip2 import build_in, make_parts, picture, tiny_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


def run(root, stage, run_dir, *settings):
    plain = ["data.mixture.0.num_views=1", "data.image_token_share=1.0", "optimizer.learning_rate=0.01"]
    recipe = apply_overrides(tiny_recipe(root, stage, steps=8), [*plain, *settings])
    job = build_in(root, recipe, run_dir)
    train(job, recipe, run_dir)
    return job


def test_adapters_learn_beside_frozen_weights_and_are_merged_into_the_exported_model(root, tmp_path):
    pytest.importorskip("peft")
    job = run(root, "stage2", tmp_path / "run", "model.lora_rank=2")
    network = job.module.model.language_model.model.eval()
    trained = {name for name, weight in job.module.named_parameters() if weight.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert adapters and not any(name.startswith("model.language_model") for name in trained - adapters)
    export(tmp_path / "model", "tuned", generation=tmp_path / "run")
    loaded = blip2.load(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = run(root, "stage2", tmp_path / "plain").module.model.language_model.model.eval()
    with torch.no_grad():
        expected, untouched = network(ids).logits, plain(ids).logits
        found = loaded.generator.language_model.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - untouched).abs().max() > 1e-3, "the adapters did nothing"
    assert isinstance(loaded.caption(picture(0).image), str)


def test_a_trained_encoder_lies_in_the_exported_folder(root, tmp_path):
    settings = ("data.cache_features=false", "model.train_vision=true")
    job = run(root, "stage1", tmp_path / "run", *settings)
    export(tmp_path / "model", "tuned", stage1=tmp_path / "run")
    assert (tmp_path / "model" / "vision" / "model.safetensors").is_file()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded = blip2.load(tmp_path / "model")
    with torch.no_grad():
        found, expected = loaded.vision_model(pixels), job.module.model.vision_model(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_encoder_that_cannot_be_exported_is_not_trained(root, tmp_path):
    with pytest.raises(BadRecipe, match="efficientnet-lite2 cannot be trained"):
        run(
            root,
            "stage1",
            tmp_path,
            "model.train_vision=true",
            "data.cache_features=false",
            "model.vision=efficientnet-lite2",
        )
