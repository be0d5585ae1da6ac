"""Several ranks compute what one process computes: losses, gradients, samples, runs; and a lost rank loses nothing."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from blip2 import distributed
from blip2.inference.stage1_losses import Stage1Batch
from blip2.model.config import QFormerConfig
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.training.loop import train
from blip2.training.progress import TIMING, read_metrics
from blip2.training.recipe import apply_overrides, to_yaml
from blip2.training.sharding import replicate
from blip2.training.stage1 import Stage1Step
from blip2.training.state import load_model, newest_checkpoint

from .tiny_blip2 import build_in, make_parts, tiny_recipe

PAIRS = 16
SHAPE = QFormerConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    encoder_hidden_size=24,
    num_query_tokens=3,
    embed_dim=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def pairs(first: int, count: int) -> Stage1Batch:
    """Some of the world's 16 pairs; texts are as long as the longest of these, so ranks pad differently."""
    chance = torch.Generator().manual_seed(1)
    features = torch.randn(PAIRS, 5, 24, generator=chance)
    ids = torch.randint(5, 50, (PAIRS, 9), generator=chance)
    lengths = torch.randint(3, 10, (PAIRS,), generator=chance)
    mask = (torch.arange(9) < lengths[:, None]).long()
    groups = torch.arange(PAIRS)
    groups[9] = groups[2]  # one caption twice, on two ranks
    drawn = torch.rand(PAIRS, 2, generator=chance)
    rows = slice(first, first + count)
    longest = int(lengths[rows].max())
    text = Text((ids * mask)[rows, :longest], mask[rows, :longest])
    return Stage1Batch(features[rows], text, groups[rows], chance=drawn[rows])


def step_of(itc_chunk: int = 0) -> Stage1Step:
    torch.manual_seed(0)
    return Stage1Step(Blip2Stage1(None, SHAPE), bos_id=1, itc_chunk=itc_chunk).train()


def losses_and_gradients() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Of the world's batch, each rank having its part, averaged as a run averages them."""
    step = step_of()
    share = PAIRS // distributed.world_size()
    replicated = replicate(step)  # it averages for as long as it lives
    losses = replicated(pairs(distributed.rank() * share, share))
    losses["loss"].backward()
    means = {name: float(distributed.summed(value)) / distributed.world_size() for name, value in losses.items()}
    return means, {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_have_the_losses_and_gradients_of_one_process(ranks):
    """Worst measured: see docs/decisions.md; the bounds are those of the promise, 1e-6 and 1e-5."""
    losses, gradients = losses_and_gradients()
    for own_losses, own_gradients in on_ranks(ranks, losses_and_gradients):
        for name in ("loss", "itc", "itm", "itg"):
            assert own_losses[name] == pytest.approx(losses[name], abs=2e-6), name
        assert own_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(own_gradients[name], gradient, rtol=0, atol=1e-5, msg=name)


def test_itc_in_chunks_equals_itc_at_once():
    results = []
    for chunk in (0, 4, 5):
        step = step_of(chunk)
        losses = step(pairs(0, PAIRS))
        losses["loss"].backward()
        results.append((float(losses["itc"].detach()), step.model.vision_projection.weight.grad))
    for itc, gradient in results[1:]:
        assert itc == pytest.approx(results[0][0], abs=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=0, atol=1e-6)


# Whole runs


@pytest.fixture(scope="module", params=[True, False], ids=["decoder", "encoder-decoder"])
def parts(request, tmp_path_factory) -> tuple[Path, bool]:
    root = tmp_path_factory.mktemp("parts")
    make_parts(root, decoder_only=request.param)
    return root, request.param


def recipe_of(root: Path, stage: str, *settings: str):
    return apply_overrides(
        tiny_recipe(root, stage, steps=4, dropout=0.0, attention_dropout=0.0),
        ["training.log_every=1", "training.checkpoint_every=2", "data.neighbour_share=0", *settings],
    )


def run(root: Path, stage: str, run_dir: Path, settings: tuple[str, ...] = ()) -> list[dict]:
    recipe = recipe_of(root, stage, *settings)
    train(build_in(root, recipe, run_dir), recipe, run_dir)
    return [line for line in read_metrics(run_dir) if line["kind"] == "train"]


def assert_alike(one: list[dict], other: list[dict], tolerance: float, *, decoder_only: bool = True) -> None:
    """The tiny encoder-decoder has gradients of a million, and rounding grows with each step: its first one counts."""
    if not decoder_only:
        one, other, tolerance = one[:1], other[:1], max(1e-3, tolerance)
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for first, second in zip(one, other, strict=True):
        for name in first.keys() - set(TIMING) - {"kind", "itc_accuracy", "itm_accuracy"}:
            assert first[name] == pytest.approx(second[name], rel=tolerance, abs=tolerance), (name, first["step"])


@pytest.mark.parametrize("stage", ["stage1", "stage2", "instruct"])
def test_a_run_on_two_ranks_learns_what_a_run_on_one_learns(parts, tmp_path, stage):
    root, decoder_only = parts
    if stage == "stage1" and not decoder_only:
        pytest.skip("stage 1 has no language model")
    alone = run(root, stage, tmp_path / "one")
    on_ranks(2, run, root, stage, tmp_path / "two")
    together = [line for line in read_metrics(tmp_path / "two") if line["kind"] == "train"]
    assert_alike(alone, together, 1e-4, decoder_only=decoder_only)
    mine, theirs = (load_model(newest_checkpoint(tmp_path / name)) for name in ("one", "two"))
    for name, value in mine.items() if decoder_only else ():
        # AdamW's first steps divide by the gradient: signs of rounding count there
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=2e-3, msg=name)


def test_a_run_that_changes_the_number_of_ranks_goes_on_with_the_same_samples(parts, tmp_path):
    root, decoder_only = parts
    alone = run(root, "stage2", tmp_path / "one")
    halves = tmp_path / "halves"
    on_ranks(2, run_until, root, "stage2", halves, 2)
    run(root, "stage2", halves)
    together = [line for line in read_metrics(halves) if line["kind"] == "train"]
    assert_alike(alone, together, 1e-4, decoder_only=decoder_only)


def run_until(root: Path, stage: str, run_dir: Path, stop_at: int) -> None:
    """Stops by SIGTERM to one rank, in the middle of a step."""
    recipe = recipe_of(root, stage)
    job = build_in(root, recipe, run_dir)
    forward, steps = job.module.forward, []

    def counted(batch):
        steps.append(1)
        if len(steps) == stop_at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(batch)

    job.module.forward = counted
    summary = train(job, recipe, run_dir)
    assert (summary.step, summary.finished) == (stop_at, False), "one rank was told to stop, and all must stop with it"


def test_frozen_layers_in_shards_give_the_run_of_whole_ones(parts, tmp_path):
    root, decoder_only = parts
    on_ranks(2, run, root, "stage2", tmp_path / "ddp")
    on_ranks(2, run, root, "stage2", tmp_path / "fsdp", ("training.strategy=fsdp",))
    whole, sharded = (
        [line for line in read_metrics(tmp_path / name) if line["kind"] == "train"] for name in ("ddp", "fsdp")
    )
    assert_alike(whole, sharded, 1e-6, decoder_only=decoder_only)
    mine, theirs = (load_model(newest_checkpoint(tmp_path / name)) for name in ("ddp", "fsdp"))
    for name, value in mine.items() if decoder_only else ():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-6, msg=name)


def test_activations_computed_again_change_nothing(parts, tmp_path):
    root, _ = parts
    kept = run(root, "stage2", tmp_path / "kept")
    again = run(root, "stage2", tmp_path / "again", ("training.activation_checkpointing=true",))
    assert_alike(kept, again, 1e-6)


def test_a_batch_that_cannot_be_dealt_out_is_refused(parts, tmp_path):
    root, _ = parts
    with pytest.raises(Exception, match=r"training.batch_size 4 in 4 parts cannot be dealt to 2 processes"):
        on_ranks(2, run, root, "stage2", tmp_path, ("training.accumulation=4",))


# Under torchrun


def torchrun(root: Path, recipe_file: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    environment = os.environ | {"BLIP2_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "blip2", "train", str(recipe_file), "--out", str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_and_the_result_is_bit_equal(tmp_path):
    root = tmp_path / "parts"
    root.mkdir()
    make_parts(root)
    recipe = recipe_of(root, "stage1", "training.steps=60", "training.checkpoint_every=5", "model.dropout=0.1")
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(to_yaml(recipe))
    quiet = torchrun(root, recipe_file, tmp_path / "quiet")
    said, _ = quiet.communicate(timeout=240)
    assert quiet.returncode == 0, said
    killed = torchrun(root, recipe_file, tmp_path / "killed", "--max-restarts", "3")
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 20 for line in read_metrics(tmp_path / "killed")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = killed.communicate(timeout=240)
    assert killed.returncode == 0, said
    assert "Going on from" in said
    first, second = (load_model(newest_checkpoint(tmp_path / name)) for name in ("quiet", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path):
    root = tmp_path / "parts"
    root.mkdir()
    make_parts(root)
    recipe = recipe_of(root, "stage1", "training.steps=2000", "training.hang_seconds=6")
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(to_yaml(recipe))
    process = torchrun(root, recipe_file, tmp_path / "run")
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 5 for line in read_metrics(tmp_path / "run")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGSTOP)
    said, _ = process.communicate(timeout=120)
    assert "The run hangs. Rank 1 (host" in said, said
    assert f"process {children[-1]})" in said


@pytest.mark.parametrize("ranks", [2, 4])
def test_samples_and_chances_of_a_pair_do_not_depend_on_its_rank(parts, tmp_path, ranks):
    root, _ = parts
    recipe = recipe_of(root, "stage1")
    whole = [build_in(root, recipe, tmp_path).batches(number) for number in range(3)]
    dealt = on_ranks(ranks, batches_of, root, tmp_path, 3)
    for number, batch in enumerate(whole):
        for field in ("image_features", "groups", "chance"):
            assert torch.equal(getattr(batch, field), torch.cat([rank[number][field] for rank in dealt])), field


def batches_of(root: Path, run_dir: Path, count: int) -> list[dict]:
    job = build_in(root, recipe_of(root, "stage1"), run_dir)
    return [dataclasses.asdict(job.batches(number)) for number in range(count)]
