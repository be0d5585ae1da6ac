"""Pictures read in every step: as cached features, varied where asked, counted where broken, and trained on."""

import json

import pytest
import torch

from blip2.data.shards import write_manifest, write_split
from blip2.errors import BadData, BadRecipe
from blip2.training.loop import train
from blip2.training.optimizer import encoder_depths, parameter_groups
from blip2.training.progress import TIMING, read_metrics
from blip2.training.recipe import apply_overrides

from .tiny_blip2 import build_in, make_parts, picture, tiny_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


def recipe_of(root, stage, *settings):
    plain = ["data.mixture.0.num_views=1", "data.image_token_share=1.0", "training.log_every=1"]
    return apply_overrides(tiny_recipe(root, stage, steps=4), [*plain, *settings])


def lines(root, recipe, run_dir):
    summary = train(build_in(root, recipe, run_dir), recipe, run_dir)
    assert summary.finished
    return [
        {name: value for name, value in line.items() if name not in TIMING}
        for line in read_metrics(run_dir)
        if line["kind"] == "train"
    ]


@pytest.mark.parametrize("stage", ["stage1", "stage2", "instruct"])
def test_plain_pictures_read_in_every_step_give_the_run_of_cached_features(root, tmp_path, stage):
    """The cache keeps float16, so the two agree to that."""
    cached = lines(root, recipe_of(root, stage), tmp_path / "cached")
    online = recipe_of(root, stage, "data.cache_features=false", "data.augment=false")
    for one, other in zip(cached, lines(root, online, tmp_path / "online"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=5e-3)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_varied_pictures_are_the_same_for_any_number_of_workers(root, tmp_path, workers):
    settings = ("data.cache_features=false", "data.mixture.0.flip=true")
    expected = lines(root, recipe_of(root, "stage1", *settings, "data.num_workers=2"), tmp_path / "two")
    assert lines(root, recipe_of(root, "stage1", *settings, f"data.num_workers={workers}"), tmp_path / "n") == expected


def spoilt_parts(tmp_path, broken):
    make_parts(tmp_path)
    folder = tmp_path / "pictures"
    samples = [picture(number) for number in range(12)]
    import dataclasses

    for number in broken:
        samples[number] = dataclasses.replace(samples[number], image=samples[number].image[:60])
    write_manifest(folder, "pictures", {"train": write_split(folder, "train", samples)})
    return tmp_path


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "online"])
def test_broken_pictures_are_counted_and_named_and_others_stand_in(tmp_path, cached):
    root = spoilt_parts(tmp_path / "parts", [3, 7]) if (tmp_path / "parts").mkdir() is None else None
    settings = (f"data.cache_features={str(cached).lower()}", "data.stop_share=1.0", "training.steps=12")
    recipe = recipe_of(root, "stage1", *settings)
    assert len(lines(root, recipe, tmp_path / "run")) == 12
    named = [json.loads(line)["sample"] for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    assert {"3", "7"} <= set(named)


def test_a_run_stops_when_too_many_pictures_are_broken(tmp_path):
    (tmp_path / "parts").mkdir()
    root = spoilt_parts(tmp_path / "parts", range(0, 12, 2))
    recipe = recipe_of(root, "stage1", "data.cache_features=false", "training.steps=200")
    with pytest.raises(BadData, match=r"samples are bad|in a row"):
        lines(root, recipe, tmp_path / "run")


def test_the_encoder_learns_where_it_may_and_slower_the_deeper(root, tmp_path):
    settings = ("data.cache_features=false", "model.train_vision=true", "optimizer.layer_decay=0.5")
    recipe = recipe_of(root, "stage1", *settings)
    job = build_in(root, recipe, tmp_path)
    network = job.module.model.vision_model.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train(job, recipe, tmp_path)
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    assert any("layers.0" in name for name in changed)
    shares = {group["layer_share"] for group in parameter_groups(job.module, 0.05, 0.5)}
    depths = set(encoder_depths(job.module).values())
    assert shares == {1.0} | {0.5**depth for depth in depths} and len(depths) > 1


def test_a_frozen_encoder_in_the_step_does_not_change(root, tmp_path):
    recipe = recipe_of(root, "stage1", "data.cache_features=false")
    job = build_in(root, recipe, tmp_path)
    before = {name: value.clone() for name, value in job.module.model.vision_model.state_dict().items()}
    train(job, recipe, tmp_path)
    after = job.module.model.vision_model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_settings_that_contradict_each_other_are_refused(root):
    with pytest.raises(BadRecipe, match="train_vision changes the image features"):
        recipe_of(root, "stage1", "model.train_vision=true")
    with pytest.raises(BadRecipe, match="image_token_share draws among cached features"):
        recipe_of(root, "stage1", "data.cache_features=false", "data.image_token_share=0.5")
