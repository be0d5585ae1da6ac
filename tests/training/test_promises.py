"""What a run promises beyond its loss: frozen parts stay, caches do not lie, bad steps count everywhere, and it learns.

docs/training.md has the table of all promises, with the test that holds each and what was measured.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from ranks import on_ranks

from blip2 import distributed, registry
from blip2.checkpoints import frozen
from blip2.data.features import CacheKey, open_or_build
from blip2.data.open_pairs.stamps import read_stamps
from blip2.errors import BadData
from blip2.training.build import build
from blip2.training.loop import train
from blip2.training.progress import read_metrics
from blip2.training.recipe import apply_overrides, read_recipe
from blip2.training.state import list_checkpoints, load_model

from .tiny_blip2 import build_in, make_parts, tiny_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


@pytest.mark.parametrize("stage", ["stage2", "instruct"])
def test_frozen_parts_keep_every_bit_and_cost_the_optimizer_nothing(root, tmp_path, stage):
    recipe = apply_overrides(
        tiny_recipe(root, stage),
        ["data.cache_features=false", "data.image_token_share=1.0", "data.mixture.0.num_views=1"],
    )
    job = build_in(root, recipe, tmp_path)
    model = job.module.model
    parts = {"encoder": model.vision_model, "language model": model.language_model}
    before = {name: frozen.fingerprint(part) for name, part in parts.items()}
    summary = train(job, recipe, tmp_path)
    assert {name: frozen.fingerprint(part) for name, part in parts.items()} == before
    for part in parts.values():
        assert all(weight.grad is None and not weight.requires_grad for weight in part.parameters())
    saved = load_model(summary.checkpoint)
    assert saved and not any(name.startswith(("model.vision_model", "model.language_model")) for name in saved)


KEY = {"encoder": "a", "pictures": "b", "views": "plain", "num_rows": 3, "shape": (2, 4)}


@pytest.mark.parametrize("changed", ["encoder", "pictures", "views"])
def test_features_of_other_weights_pictures_or_views_are_never_read(tmp_path, changed):
    made = []

    def encode(rows: range) -> np.ndarray:
        made.append(rows)
        return np.full((len(rows), 2, 4), len(made), np.float16)

    first = open_or_build(tmp_path, CacheKey(**KEY), encode)
    again = open_or_build(tmp_path, CacheKey(**KEY), encode)
    assert len(made) == 1 and again.read(0)[0, 0] == first.read(0)[0, 0] == 1
    other = open_or_build(tmp_path, CacheKey(**{**KEY, changed: "other"}), encode)
    assert len(made) == 2 and other.read(0)[0, 0] == 2


def test_a_cache_under_anothers_name_is_refused(tmp_path):
    key, other = CacheKey(**KEY), CacheKey(**{**KEY, "encoder": "other"})
    open_or_build(tmp_path, key, lambda rows: np.zeros((len(rows), 2, 4), np.float16))
    os.rename(tmp_path / key.name, tmp_path / other.name)
    with pytest.raises(BadData, match="holds features of something else"):
        open_or_build(tmp_path, other, lambda rows: np.zeros((len(rows), 2, 4), np.float16))


def spoilt_on_one_rank(root: Path, run_dir: Path) -> tuple[int, list[str]]:
    """A run in which the second rank's loss is not a number in steps 2 and 3; what was skipped, and the weights."""
    recipe = apply_overrides(tiny_recipe(root, "stage1", steps=5), ["training.log_every=1"])
    job = build_in(root, recipe, run_dir)
    forward, calls, weights = job.module.forward, [], []

    def spoilt(batch):
        calls.append(1)
        weights.append(float(job.module.model.query_tokens.detach().double().sum()))
        losses = forward(batch)
        if distributed.rank() == 1 and len(calls) in (2, 3):
            losses["loss"] = losses["loss"] * float("nan")
        return losses

    job.module.forward = spoilt
    summary = train(job, recipe, run_dir)
    return summary.skipped, [f"{value:.12f}" for value in weights]


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(root, tmp_path):
    (skipped, weights), (skipped_too, weights_too) = on_ranks(2, spoilt_on_one_rank, root, tmp_path)
    assert skipped == skipped_too == 2
    assert weights == weights_too, "the ranks went apart"
    assert weights[1] == weights[2] == weights[3], "a skipped step changed the weights"
    assert len({weights[0], weights[3], weights[4]}) == 3


def test_checkpoints_of_two_ranks_are_written_once(root, tmp_path):
    on_ranks(2, spoilt_on_one_rank, root, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000005", "step-000004"]
    steps = [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert steps == sorted(set(steps))


# It learns


def own_pictures(folder: Path, count: int) -> None:
    """A folder as people have it: pictures, and a text file beside each."""
    folder.mkdir()
    seen = set()
    for picture in read_stamps():
        if picture.caption in seen:
            continue
        seen.add(picture.caption)
        buffer = io.BytesIO()
        picture.cutout.convert("RGB").save(buffer, "JPEG", quality=90)
        (folder / f"{len(seen):03d}.jpg").write_bytes(buffer.getvalue())
        (folder / f"{len(seen):03d}.txt").write_text(picture.caption)
        if len(seen) == count:
            return


@pytest.mark.slow
def test_a_folder_of_64_pictures_is_learnt_until_each_finds_its_own_caption(tmp_path):
    for key in ("stamps", "efficientnet-lite2", "minilm-l6-v2"):
        registry.fetch(key)
    own_pictures(tmp_path / "pictures", 64)
    recipe = apply_overrides(
        read_recipe("mini/stage1"),
        [
            f"data.mixture=[{{source: 'folder:{tmp_path / 'pictures'}'}}]",
            f"data.validation=['folder:{tmp_path / 'pictures'}']",
            "model.init_from=null",
            "training.steps=60",
            "training.batch_size=64",
            "training.evaluate_every=20",
            "training.best_metric=null",
        ],
    )
    summary = train(build(recipe, tmp_path / "run"), recipe, tmp_path / "run")
    found = {name: value for name, value in summary.metrics.items() if name.endswith("/r1")}
    print(json.dumps(summary.metrics))
    assert next(iter(found.values())) >= 0.9
