"""Checkpoints beside the training: the best is kept, copies elsewhere are whole, the average is what is used."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from blip2.errors import BadRecipe, UserError
from blip2.training import loop, state
from blip2.training.averages import RunningAverage
from blip2.training.keeper import Best, Keeper, Mirror, better, recall
from blip2.training.loop import train
from blip2.training.optimizer import build_optimizer

from .tiny_run import TinyModel, run_tiny, tiny_job, tiny_recipe


def snapshot(step: int) -> state.Snapshot:
    module = TinyModel()
    return state.take_snapshot(module, build_optimizer(module, tiny_recipe().optimizer), {"step": step})


def names(run_dir: Path) -> list[str]:
    return [path.name for path in state.list_checkpoints(run_dir)]


def test_the_best_checkpoint_outlives_the_newest_ones(tmp_path):
    keeper = Keeper(tmp_path, keep=2)
    keeper.crown(Best(10, "held_out/r1", 0.5))
    for step in (10, 20, 30, 40):
        keeper.save(snapshot(step))
    keeper.wait()
    assert names(tmp_path) == ["step-000040", "step-000030", "step-000010"]
    assert state.find_checkpoint(tmp_path / "best").name == "step-000010"
    keeper.crown(Best(40, "held_out/r1", 0.6))
    keeper.save(snapshot(50))
    keeper.close()
    assert names(tmp_path) == ["step-000050", "step-000040"]


@pytest.mark.parametrize(
    ("metric", "value", "best", "expected"),
    [
        ("a/r1", 0.6, 0.5, True),
        ("a/r1", 0.5, 0.5, False),
        ("a/loss", 0.6, 0.5, False),
        ("a/loss", 0.4, 0.5, True),
        ("a/loss", 0.4, None, True),
    ],
)
def test_less_is_better_for_a_loss_only(metric, value, best, expected):
    assert better(metric, value, Best(1, metric, best) if best is not None else None) == expected


def test_a_snapshot_does_not_change_with_the_training(tmp_path):
    module = TinyModel()
    optimizer = build_optimizer(module, tiny_recipe().optimizer)
    taken = state.take_snapshot(module, optimizer, {"step": 1})
    before = {name: value.clone() for name, value in taken.model.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert all(torch.equal(taken.model[name], value) for name, value in before.items())


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_run_whose_folder_is_lost_goes_on_from_its_mirror(tmp_path, place):
    pytest.importorskip("fsspec")
    mirror = str(tmp_path / "mirror") if place == "folder" else f"memory://{tmp_path.name}"
    settings = [f"training.mirror={mirror}", "training.steps=40"]
    run_tiny(tmp_path / "whole", ["training.steps=60"])
    run_tiny(tmp_path / "run", settings)
    shutil.rmtree(tmp_path / "run")
    ended = run_tiny(tmp_path / "run", [settings[0], "training.steps=60"])
    assert ended.finished
    mine, theirs = (state.load_model(state.newest_checkpoint(tmp_path / name)) for name in ("run", "whole"))
    assert mine.keys() == theirs.keys()
    kept = Mirror(mirror)
    assert sorted(kept._complete()) == sorted(names(tmp_path / "run"))


def test_a_copy_that_was_broken_off_counts_for_nothing(tmp_path):
    pytest.importorskip("fsspec")
    run_tiny(tmp_path / "run", [f"training.mirror={tmp_path / 'mirror'}", "training.steps=40"])
    newest = sorted((tmp_path / "mirror").iterdir())[-1]
    (newest / state.MANIFEST).unlink()
    shutil.rmtree(tmp_path / "run")
    fetched = Mirror(str(tmp_path / "mirror")).fetch_newest(tmp_path / "run")
    assert fetched is not None and fetched.name < newest.name


def test_a_place_that_cannot_be_opened_is_named():
    pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=r"training.mirror: nowhere://x cannot be opened"):
        Mirror("nowhere://x")


# Best and early stopping


def scored(values: list[float]):
    """An evaluator that gives these values in turn."""
    left = iter(values)
    return lambda: {"held_out/r1": next(left)}


def test_the_best_evaluation_is_noted_and_kept_and_the_run_ends_when_it_gets_no_better(tmp_path):
    recipe = tiny_recipe("training.best_metric=held_out/r1", "training.early_stop=2", "training.steps=200")
    job = tiny_job(recipe, evaluators=[(10, scored([0.1, 0.4, 0.3, 0.4, 0.9]))])
    summary = train(job, recipe, tmp_path)
    assert (summary.step, summary.finished) == (40, True)
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 20, "metric": "held_out/r1", "value": 0.4}
    assert state.find_checkpoint(tmp_path / "best").name == "step-000020"


@pytest.mark.parametrize("checkpoint_every", [10, 4])
@pytest.mark.parametrize("killed_at", [10, 20, 30, 40])
def test_a_kill_between_an_evaluation_and_its_verdict_changes_no_end(
    tmp_path, monkeypatch, killed_at, checkpoint_every
):
    class Killed(BaseException):
        pass

    settings = ["training.best_metric=held_out/r1", "training.early_stop=2", "training.steps=200"]
    recipe = tiny_recipe(*settings, f"training.checkpoint_every={checkpoint_every}")
    values, judge = [0.1, 0.4, 0.3, 0.4, 0.9], loop.Run._judge

    def killed(self, metrics):
        if self.counters.step == killed_at:
            raise Killed
        judge(self, metrics)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop.Run, "_judge", killed)
        train(tiny_job(recipe, evaluators=[(10, scored(values))]), recipe, tmp_path)
    start = state.step_of(state.newest_checkpoint(tmp_path))  # what was evaluated after it is evaluated anew
    left = values[start // 10 :]
    summary = train(tiny_job(recipe, evaluators=[(10, scored(left))]), recipe, tmp_path)
    assert (summary.step, summary.finished) == (40, True)
    assert state.find_checkpoint(tmp_path / "best").name == "step-000020"
    again = train(tiny_job(recipe, evaluators=[(10, scored([]))]), recipe, tmp_path)
    assert (again.step, again.finished) == (40, True)


def test_the_best_is_noted_only_when_its_checkpoint_is_there(tmp_path, monkeypatch):
    keeper = Keeper(tmp_path, keep=2)
    keeper.save(snapshot(10), Best(10, "held_out/r1", 0.5))
    keeper.wait()
    write = state.write

    def full(run_dir, taken):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "write", full)
    keeper.save(snapshot(20), Best(20, "held_out/r1", 0.6))
    with pytest.raises(OSError, match="No space"):
        keeper.wait()
    assert state.find_checkpoint(tmp_path / "best").name == "step-000010"
    monkeypatch.setattr(state, "write", write)
    keeper.save(snapshot(30), Best(30, "held_out/r1", 0.7))
    keeper.close()
    assert state.find_checkpoint(tmp_path / "best").name == "step-000030"


def test_a_best_that_is_past_the_start_is_forgotten(tmp_path):
    keeper = Keeper(tmp_path, keep=2)
    keeper.save(snapshot(10), Best(10, "held_out/r1", 0.5))
    keeper.close()
    assert recall(tmp_path, "held_out/r1", [(5, 0.1), (10, 0.5), (15, 0.4)], 15) == (Best(10, "held_out/r1", 0.5), 1)
    assert recall(tmp_path, "held_out/r1", [(5, 0.1)], 5) == (None, 0)
    shutil.rmtree(state.checkpoint_path(tmp_path, 10))
    assert recall(tmp_path, "held_out/r1", [(5, 0.1), (10, 0.5)], 10) == (None, 0)


def test_a_metric_that_no_evaluation_gives_is_named(tmp_path):
    recipe = tiny_recipe("training.best_metric=held_out/r5")
    job = tiny_job(recipe, evaluators=[(10, scored([0.1]))])
    with pytest.raises(BadRecipe, match=r"give no held_out/r5; they give held_out/r1\."):
        train(job, recipe, tmp_path)


# Running averages


def test_the_average_follows_its_formula_and_is_what_is_used(tmp_path):
    module = TinyModel()
    average = RunningAverage(module, 0.9)
    weight = module.bridge[0].weight
    expected = weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            weight.add_(1.0)
        average.update()
        expected = 0.9 * expected + 0.1 * weight.detach()
    own = weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), own)


def test_a_run_with_an_average_resumes_exactly_and_exports_the_average(tmp_path):
    settings = ["training.ema_decay=0.9", "training.steps=30"]
    whole = run_tiny(tmp_path / "whole", settings)
    run_tiny(tmp_path / "parts", [*settings[:1], "training.steps=20", "optimizer.warmup_steps=10"])
    assert (whole.checkpoint / state.AVERAGE).is_file()
    used, trained = state.load_model(whole.checkpoint), TinyModel()
    state.restore(whole.checkpoint, trained, build_optimizer(trained, tiny_recipe().optimizer))
    name, weight = "bridge.0.weight", trained.bridge[0].weight
    assert not torch.equal(used[name], weight), "the average lags behind the weights"
    assert torch.equal(state.load_average(whole.checkpoint)[name], used[name])


# Spikes


class Leaps(TinyModel):
    """Has a gradient a thousand times as long at one step."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    def forward(self, inputs):
        losses = super().forward(inputs)
        self.left -= self.training
        if self.left == 0:
            losses["loss"] = losses["loss"] * 1000
        return losses


def test_a_step_with_an_unusually_long_gradient_is_skipped(tmp_path, capfd):
    recipe = tiny_recipe("training.skip_spikes=20", "training.steps=80")
    summary = train(tiny_job(recipe, module=Leaps(70)), recipe, tmp_path)
    assert (summary.skipped, summary.finished) == (1, True)
    assert "step 70 skipped: grad_norm" in capfd.readouterr().err
