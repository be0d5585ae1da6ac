"""The loop: resuming repeats bits, bad steps change nothing, and what a run was told to do it does or refuses."""

import json
import os
import resource
import signal

import pytest
import torch

from blip2.errors import BadRecipe, Blip2Error, UserError
from blip2.training.devices import resolve_precision
from blip2.training.loop import MOST_SKIPS_IN_A_ROW, train
from blip2.training.optimizer import build_optimizer, learning_rate
from blip2.training.progress import TIMING, duration, read_metrics
from blip2.training.state import MODEL, OPTIMIZER, list_checkpoints, load_model, step_of, trainable_state
from blip2.training.step import seed_step

from .tiny_run import TinyModel, run_tiny, sample_ids, start_process, tiny_job, tiny_recipe


def files(summary):
    return [(summary.checkpoint / name).read_bytes() for name in (MODEL, OPTIMIZER)]


def lines(run_dir):
    return [{name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(run_dir)]


class StopsAt(TinyModel):
    """Sends this process a signal in the middle of the given step."""

    def __init__(self, step, number=signal.SIGTERM):
        super().__init__()
        self.left, self.number = step, number

    def forward(self, inputs):
        self.left -= self.training
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().forward(inputs)


class Spoilt(TinyModel):
    """Gives a loss, or a gradient, that is not finite at some steps."""

    def __init__(self, steps, what):
        super().__init__()
        self.steps, self.what, self.step = set(steps), what, 0

    def forward(self, inputs):
        losses = super().forward(inputs)
        self.step += self.training
        if self.step in self.steps and self.what == "loss":
            losses["loss"] = losses["loss"] * float("nan")
        if self.step in self.steps and self.what == "gradient":
            # the square root's slope at 0 is infinite, its value is not
            losses["loss"] = losses["loss"] + (self.bridge[0].weight.sum() * 0).sqrt()
        return losses


@pytest.mark.parametrize(
    "settings",
    [(), ("training.accumulation=4",), ("training.batch_size=5", "seed=8"), ("training.precision=bfloat16",)],
    ids=["plain", "accumulation", "odd batch", "bfloat16"],
)
def test_a_run_resumed_half_way_repeats_the_bits_of_an_uninterrupted_one(tmp_path, settings):
    recipe = tiny_recipe("training.steps=200", *settings)
    whole = train(tiny_job(recipe), recipe, tmp_path / "whole")
    half = train(tiny_job(recipe, module=StopsAt(100 * recipe.training.accumulation)), recipe, tmp_path / "halves")
    assert (half.step, half.finished) == (100, False)
    resumed = train(tiny_job(recipe), recipe, tmp_path / "halves")
    assert (resumed.step, resumed.finished) == (200, True)
    assert files(resumed) == files(whole)
    assert lines(tmp_path / "halves") == lines(tmp_path / "whole")


def test_the_loss_falls(tmp_path):
    run_tiny(tmp_path, ["training.steps=200"])
    losses = [line["loss"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("max_grad_norm", [0.0, 2.0])
def test_a_run_does_what_a_plain_loop_does(tmp_path, max_grad_norm):
    """Bit for bit: seed, loss, gradient, clip (the norm here is about 10), learning rate, AdamW."""
    recipe = tiny_recipe("training.steps=20", f"optimizer.max_grad_norm={max_grad_norm}")
    module, batches = TinyModel().train(), tiny_job(recipe).batches
    optimizer = build_optimizer(module, recipe.optimizer)
    for step in range(20):
        seed_step(recipe.seed, step)
        module(batches(step))["loss"].backward()
        if max_grad_norm:
            decayed, plain = (group["params"] for group in optimizer.param_groups)
            torch.nn.utils.clip_grad_norm_([*decayed, *plain], max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.optimizer, 20)
        optimizer.step()
        optimizer.zero_grad()
    trained = load_model(train(tiny_job(recipe), recipe, tmp_path).checkpoint)
    assert all(torch.equal(trained[name], value) for name, value in trainable_state(module).items())


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_step_sees_the_same_samples_in_one_part_or_several(parts):
    whole, split = tiny_recipe(), tiny_recipe(f"training.accumulation={parts}")
    for step in range(20):
        ids = [place for part in range(parts) for place in sample_ids(split, step * parts + part)]
        assert ids == sample_ids(whole, step)


class WithoutChance(TinyModel):
    """Draws nothing and compares no samples, so that parts of a batch add up to the batch."""

    def forward(self, inputs):
        fit = (self.bridge(self.frozen(inputs)) - inputs.sum(dim=-1, keepdim=True)).square().mean()
        return {"loss": fit, "fit": fit}


def test_gradients_of_equal_parts_add_up_to_those_of_the_batch(tmp_path):
    """To float32 rounding over 20 AdamW steps: worst difference measured is 6.0e-8 on parameters up to 1.1."""
    results = []
    for parts in (1, 4):
        recipe = tiny_recipe(f"training.accumulation={parts}", "training.steps=20")
        module = WithoutChance()
        module.bridge[2].p = 0.0
        results.append(load_model(train(tiny_job(recipe, module=module), recipe, tmp_path / str(parts)).checkpoint))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_parameter_and_is_counted(tmp_path, what):
    recipe = tiny_recipe("training.steps=5", "training.log_every=1")
    before = {name: value.clone() for name, value in trainable_state(TinyModel()).items()}
    summary = train(tiny_job(recipe, module=Spoilt(range(1, 6), what)), recipe, tmp_path)
    assert summary.skipped == 5
    after = load_model(summary.checkpoint)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [line["skipped"] for line in lines(tmp_path) if line["kind"] == "train"] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_after_a_few_bad_steps_and_logs_no_nan(tmp_path):
    recipe = tiny_recipe("training.steps=30")
    summary = train(tiny_job(recipe, module=Spoilt([4, 5, 20], "loss")), recipe, tmp_path)
    assert (summary.skipped, summary.finished) == (3, True)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_that_stays_bad_stops_with_a_diagnosis_and_keeps_its_checkpoint(tmp_path):
    recipe = tiny_recipe()
    with pytest.raises(Blip2Error) as stop:
        train(tiny_job(recipe, module=Spoilt(range(13, 61), "loss")), recipe, tmp_path)
    message = str(stop.value)
    assert f"Stopped at step {12 + MOST_SKIPS_IN_A_ROW}: loss, grad_norm not finite" in message
    assert "Lower optimizer.learning_rate" in message
    assert "step-000030" in message


def test_evaluators_run_when_due_and_at_the_end(tmp_path):
    recipe = tiny_recipe("training.steps=50")
    ran = []
    evaluators = [(20, lambda: ran.append("often") or {"often": 1.0}), (0, lambda: ran.append("end") or {"end": 2.0})]
    summary = train(tiny_job(recipe, evaluators=evaluators), recipe, tmp_path)
    told = [(line["step"], set(line) & {"often", "end"}) for line in lines(tmp_path) if line["kind"] == "evaluate"]
    assert told == [(20, {"often"}), (40, {"often"}), (50, {"often", "end"})]
    assert ran == ["often", "often", "often", "end"]
    assert summary.metrics["end"] == 2.0


def test_evaluating_leaves_the_training_as_it_was(tmp_path):
    """Evaluators may draw random numbers, and see the module in eval mode without gradients."""
    recipe = tiny_recipe()
    job = tiny_job(recipe)
    modes = []

    def draws():
        modes.append((job.module.training, torch.is_grad_enabled()))
        return {"drawn": float(torch.rand(()))}

    job.evaluators = [(7, draws)]
    evaluated = train(job, recipe, tmp_path / "evaluated")
    plain = train(tiny_job(recipe, evaluators=()), recipe, tmp_path / "plain")
    assert set(modes) == {(False, False)}
    assert files(evaluated) == files(plain)


def test_a_stop_during_an_evaluation_breaks_it_off_and_the_resumed_run_makes_up_for_it(tmp_path):
    recipe = tiny_recipe()
    job = tiny_job(recipe)

    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have ended this evaluation")

    summary = train(tiny_job(recipe, evaluators=[(25, stopped)]), recipe, tmp_path / "stopped")
    assert summary.step == 25
    train(tiny_job(recipe), recipe, tmp_path / "stopped")
    train(job, recipe, tmp_path / "whole")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    class Impatient(StopsAt):
        def forward(self, inputs):
            losses = super().forward(inputs)
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return losses

    recipe = tiny_recipe()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_job(recipe, module=Impatient(15, signal.SIGINT)), recipe, tmp_path)
    assert run_tiny(tmp_path).finished


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = run_tiny(tmp_path)
    before = files(first), lines(tmp_path)
    again = run_tiny(tmp_path)
    assert (again.finished, files(again), lines(tmp_path)) == (True, *before)


def test_a_resumed_run_ignores_a_log_line_that_was_cut_short(tmp_path):
    recipe = tiny_recipe()
    train(tiny_job(recipe, module=StopsAt(30)), recipe, tmp_path / "cut")
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 3')
    run_tiny(tmp_path / "cut")
    run_tiny(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def train_with_little_room(run_dir, tell):
    """Makes 12 steps, then goes on in a process that can write no file beyond 2.5 kB, as on a full disk."""
    recipe = tiny_recipe()
    train(tiny_job(recipe, module=StopsAt(12)), recipe, run_dir)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
    try:
        train(tiny_job(recipe), recipe, run_dir)
    except Blip2Error as fault:
        tell.send(str(fault))


def test_a_run_on_a_full_disk_ends_with_what_to_do_and_can_go_on(tmp_path):
    process, listen = start_process(train_with_little_room, tmp_path / "full")
    told = listen.recv()
    process.join()
    assert "(File too large). The last checkpoint is " in told
    assert told.endswith("step-000012. Make room and run the same command again.")
    assert files(run_tiny(tmp_path / "full")) == files(run_tiny(tmp_path / "whole"))
    assert lines(tmp_path / "full") == lines(tmp_path / "whole")


# Resuming on purpose


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    run_tiny(tmp_path, ["training.steps=10"])
    with pytest.raises(BadRecipe) as refusal:
        run_tiny(tmp_path, ["training.steps=20", "optimizer.weight_decay=0.2"])
    assert "optimizer.weight_decay is 0.2 here, 0.05 there" in str(refusal.value)
    assert "--resume" in str(refusal.value)


def test_a_run_can_be_made_longer_and_logged_otherwise(tmp_path, capsys):
    run_tiny(tmp_path, ["training.steps=10"])
    summary = run_tiny(tmp_path, ["training.steps=20", "training.log_every=5"])
    assert summary.step == 20
    assert "Changed since the checkpoint: training.steps is 20 here, 10 there" in capsys.readouterr().err


def test_never_resuming_does_not_overwrite_a_run(tmp_path):
    run_tiny(tmp_path, ["training.steps=10"])
    recipe = tiny_recipe()
    with pytest.raises(UserError, match="already holds a run: choose another --out"):
        train(tiny_job(recipe), recipe, tmp_path, resume="never")


def test_an_older_checkpoint_can_be_taken_up_with_another_recipe(tmp_path):
    """What lies past it is removed, or the new run would meet its predecessor's checkpoints."""
    run_tiny(tmp_path, ["training.steps=30", "training.keep=3"])
    oldest = list_checkpoints(tmp_path)[-1]
    assert step_of(oldest) == 10
    recipe = tiny_recipe("training.steps=30", "training.keep=3", "optimizer.learning_rate=0.5")
    summary = train(tiny_job(recipe), recipe, tmp_path, resume=oldest)
    state = json.loads((summary.checkpoint / "state.json").read_text())
    assert state["recipe"]["optimizer"]["learning_rate"] == 0.5
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "train"] == [7, 14, 21, 28, 30]


def test_another_run_can_be_taken_up_in_a_new_folder(tmp_path):
    run_tiny(tmp_path / "first", ["training.steps=20"])
    recipe = tiny_recipe("training.steps=40")
    there = train(tiny_job(recipe), recipe, tmp_path / "second", resume=tmp_path / "first")
    here = run_tiny(tmp_path / "first", ["training.steps=40"])
    assert files(there) == files(here)


# What a run says


def test_a_run_tells_how_far_it_is(tmp_path, capsys):
    run_tiny(tmp_path, ["training.steps=14", "optimizer.warmup_steps=100"])
    told = capsys.readouterr()
    assert told.out == ""
    assert "tiny: 193 trainable parameters, float32 on cpu" in told.err
    assert "The warm-up (100 steps) outlasts the run" in told.err
    assert "step 7/14 · loss " in told.err
    assert " samples/s · " in told.err
    assert "Finished 14 steps in " in told.err


def test_a_run_draws_its_curves_and_keeps_its_recipe(tmp_path):
    run_tiny(tmp_path, ["training.steps=14"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "steps: 14" in (tmp_path / "recipe.yaml").read_text()


def test_a_fault_in_reading_a_batch_ends_the_run_with_that_fault(tmp_path):
    recipe = tiny_recipe()
    job = tiny_job(recipe)
    good = job.batches

    def breaks(index):
        if index == 12:
            raise Blip2Error("shard 3 is cut short")
        return good(index)

    job.batches = breaks
    with pytest.raises(Blip2Error, match="shard 3 is cut short"):
        train(job, recipe, tmp_path)
    assert run_tiny(tmp_path).finished


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (7500, "2 h 05 min"), (100000, "1 d 03 h")]
)
def test_durations_read_as_people_say_them(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_precision_that_is_asked_for_is_taken(precision):
    assert resolve_precision(precision, torch.device("cpu")) == precision


@pytest.mark.parametrize(
    ("amx", "avx512", "chosen"), [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")]
)
def test_auto_is_bfloat16_where_the_processor_has_units_for_it(monkeypatch, amx, avx512, chosen):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert resolve_precision("auto", torch.device("cpu")) == chosen
