"""The training loop: step, accumulate, clip, log, evaluate, save, stop.

    batches(i) --(some ahead)--> forward, backward --> clip --> AdamW --> log . checkpoint . evaluate
                                      |                 |
                                      +-- not finite? --+--> nothing changes, the skip is counted

All that a step draws at random follows from (recipe.seed, step, rank), and its samples from their positions. So a
checkpoint needs no reader's state, and a resumed run repeats the uninterrupted one bit for bit on a CPU.

Under torchrun each rank computes its share of every batch. Gradients and losses are averaged, so all ranks take the
same decisions: what to skip, when to stop. The first rank alone writes and reports; the run's folder is shared.
"""

import dataclasses
import errno
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blip2 import distributed
from blip2.errors import BadRecipe, Blip2Error
from blip2.training import state as checkpoints
from blip2.training.averages import RunningAverage
from blip2.training.compiled import without_compiling
from blip2.training.devices import resolve_precision, use_threads
from blip2.training.job import Job, Metrics, StepParts, Summary
from blip2.training.keeper import Best, Keeper, better, recall
from blip2.training.optimizer import build_optimizer, learning_rate
from blip2.training.progress import CurvePainter, MetricsLog, Reporter, duration
from blip2.training.recipe import to_settings, to_yaml
from blip2.training.resuming import check_same_recipe, fetched
from blip2.training.sections import Recipe
from blip2.training.sharding import replicate
from blip2.training.signals import BrokenOff, StopSignals
from blip2.training.step import StepOutcome, Stepper
from blip2.training.watch import COMPUTING, READING, HangWatch

MOST_SKIPS_IN_A_ROW = 20
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Counters:
    """What a run counts; saved with each checkpoint."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    usual_norm: float = 0.0
    evaluations_since_best: int = 0
    window_steps: int = 0
    window: Metrics = field(default_factory=dict)


def train(job: Job, recipe: Recipe, run_dir: str | Path, resume: str | Path = "auto") -> Summary:
    """Trains until the recipe's last step, or until SIGTERM or Ctrl-C, and leaves a checkpoint.

    Args:
        job: what is trained.
        recipe: how; it is saved with each checkpoint.
        run_dir: the run's folder.
        resume: "auto" goes on from the folder's newest complete checkpoint, if there is one; "never" insists on a
            folder without checkpoints; a path takes up that checkpoint, or that run's newest, with this recipe, and
            removes what this folder holds past it.

    Raises:
        BadRecipe: the folder's run has another recipe.
        UserError: "never" on a folder with checkpoints, or another process is training into it.
        Blip2Error: the loss stayed infinite or not a number, or the disk is full at the end.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    use_threads(recipe.training.threads)
    with checkpoints.only_writer(run_dir) if distributed.is_first() else nullcontext():
        try:
            with closing(Run(job, recipe, run_dir, resume)) as run:
                return run.go()
        except OSError as fault:
            if fault.errno in NO_ROOM:
                raise Blip2Error(_no_room(run_dir, fault)) from None
            raise


class Run:
    """A run under way: the job, its optimizer, its counters and where it reports."""

    def __init__(self, job: Job, recipe: Recipe, run_dir: Path, resume: str | Path):
        self.job, self.recipe, self.run_dir = job, recipe, run_dir
        training = recipe.training
        self.optimizer = build_optimizer(job.module, recipe.optimizer)
        self.device = next(job.module.parameters()).device
        self.precision = resolve_precision(training.precision, self.device)
        self.average = RunningAverage(job.module, training.ema_decay) if training.ema_decay else None
        notices = fetched(run_dir, training.mirror) if resume == "auto" else []
        distributed.wait_for_all()
        start = checkpoints.choose_start(run_dir, resume)
        self._changed: list[str] = []  # sources that say other things than when the run was begun
        notices += check_same_recipe(start, recipe, run_dir, resume) if start else []
        self.counters = Counters() if start is None else self._take_up(start)
        module = replicate(job.module, leaves_some_out=job.leaves_some_out)
        self.stepper = Stepper(module, self.optimizer, self.average, recipe, self.precision)
        distributed.wait_for_all()  # all have read the start before anything past it is removed
        self.reporter = Reporter(training.steps, self.counters.step, is_silent=not distributed.is_first())
        self.log = MetricsLog(run_dir, self.counters.step, is_read_only=not distributed.is_first())
        self.painter = CurvePainter(run_dir)
        self.keeper = Keeper(run_dir, training.keep, training.mirror)
        if distributed.is_first():
            notices += checkpoints.discard_after(run_dir, self.counters.step)
            (run_dir / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        self.best = self._recall_best()
        self._goes_on_by_itself = resume == "auto"
        self.watch = HangWatch(
            run_dir, distributed.rank(), training.hang_seconds if distributed.world_size() > 1 else 0
        )
        self.metrics: Metrics = {}
        self._was_told_to_stop = False
        self._last_line = (self.counters.step, self.counters.seconds, self.counters.waited)
        for line in [*notices, *self._opening(start)]:
            self.reporter.say(line)

    def go(self) -> Summary:
        """Makes the steps that are left."""
        counters, training = self.counters, self.recipe.training
        self.job.module.train()
        with ExitStack() as inside:
            stop = inside.enter_context(StopSignals())
            batches = inside.enter_context(self.job.reading(counters.step, training.steps, training.accumulation))
            inside.enter_context(self.watch.watching())
            self._evaluate_if_due(stop)  # a run stopped during an evaluation makes up for it
            while counters.step < training.steps and not self._is_over(stop):
                begin = time.perf_counter()
                self.watch.at(counters.step, READING)
                ready = self._without_faults(next(batches))
                waited = time.perf_counter() - begin
                self.watch.at(counters.step, COMPUTING)
                outcome = self.stepper.make(counters.step, ready, counters.usual_norm, lambda: bool(stop.asked))
                self._was_told_to_stop = outcome.is_told_to_stop
                self._count(outcome, time.perf_counter() - begin, waited)
                if counters.step % training.log_every == 0 or counters.step == training.steps:
                    self._log_window()
                if counters.step % training.checkpoint_every == 0 and counters.step < training.steps:
                    self._save_and_go_on()
                self._evaluate_if_due(stop)
            return self._end(stop)

    def _is_over(self, stop: StopSignals) -> bool:
        """Whether a signal, at any rank, or early stopping ends the run; the same on all ranks."""
        patience = self.recipe.training.early_stop
        if patience and self.counters.evaluations_since_best >= patience:
            return True
        return self._was_told_to_stop if distributed.world_size() > 1 else bool(stop.asked)

    def close(self) -> None:
        """Closes the log and takes the bar away."""
        self.keeper.close()
        self.log.close()
        self.reporter.close()

    def _without_faults(self, parts: StepParts) -> list[Any]:
        """A step's batches; the samples that others stand in for are counted."""
        faults, samples = self.job.faults, self.recipe.training.batch_size // distributed.world_size()
        if faults:
            for fault in parts.faults:
                faults.record(fault)
            faults.seen(samples + len(parts.faults))
        return parts.batches

    # Between steps

    def _count(self, outcome: StepOutcome, seconds: float, waited: float) -> None:
        counters = self.counters
        counters.step += 1
        counters.seconds += seconds
        counters.waited += waited
        self.reporter.stepped(counters.step, seconds)
        if not outcome.fault:
            norm, usual = outcome.metrics["grad_norm"], counters.usual_norm
            counters.usual_norm = 0.98 * usual + 0.02 * norm if usual else norm
            counters.skipped_in_a_row = 0
            counters.window_steps += 1
            for name, value in outcome.metrics.items():
                counters.window[name] = counters.window.get(name, 0.0) + value
            return
        counters.skipped += 1
        counters.skipped_in_a_row += 1
        self.reporter.say(f"step {counters.step} skipped: {outcome.fault}")
        if counters.skipped_in_a_row >= MOST_SKIPS_IN_A_ROW:
            raise Blip2Error(self._diagnosis(outcome.fault))

    def _diagnosis(self, fault: str) -> str:
        self._wait_for_checkpoint()
        newest = checkpoints.newest_checkpoint(self.run_dir)
        return (
            f"Stopped at step {self.counters.step}: {fault}, {MOST_SKIPS_IN_A_ROW} steps in a row, and nothing was "
            "learnt in them. Lower optimizer.learning_rate, set training.precision=float32, or look at the samples of "
            f"these steps. The last checkpoint is {newest or 'none'}."
        )

    def _log_window(self) -> None:
        """One line with the averages since the last one, of the steps that were not skipped."""
        counters, training = self.counters, self.recipe.training
        metrics = {name: total / counters.window_steps for name, total in counters.window.items()}
        metrics["learning_rate"] = learning_rate(counters.step - 1, self.recipe.optimizer, training.steps)
        metrics["skipped"] = counters.skipped
        if self.job.faults:
            metrics["bad_samples"] = self.job.faults.num_faults
        since, then, waited = self._last_line
        self._last_line = (counters.step, counters.seconds, counters.waited)
        seconds = counters.seconds - then
        metrics["samples_per_second"] = training.batch_size * (counters.step - since) / seconds
        metrics["waiting_share"] = (counters.waited - waited) / seconds
        metrics["seconds"] = counters.seconds
        counters.window, counters.window_steps = {}, 0
        self.log.write("train", counters.step, metrics)
        self.reporter.training(counters.step, metrics)
        self.metrics = metrics

    def _evaluate_if_due(self, stop: StopSignals) -> None:
        """Runs the evaluators whose turn it is; a signal breaks them off, and the resumed run repeats them."""
        step, steps = self.counters.step, self.recipe.training.steps
        due = [
            evaluate
            for every, evaluate in self.job.evaluators
            if step == steps or (every and step and step % every == 0)
        ]
        if not due or step in self.log.evaluated or self._is_over(stop):
            return
        if step == steps:
            self._save_and_go_on()  # the work is safe before anything else can fail
            self._wait_for_checkpoint()
        begin = time.perf_counter()
        metrics: Metrics = {}
        self.job.module.eval()
        with ExitStack() as inside:
            inside.enter_context(self.watch.resting())
            inside.enter_context(suppress(BrokenOff))
            if not self.job.is_sharded:  # ranks that compute together must not leave apart
                inside.enter_context(stop.breaking_off())
            inside.enter_context(without_compiling())
            inside.enter_context(torch.no_grad())
            if self.average:
                inside.enter_context(self.average.in_place())
            for evaluate in due:
                metrics |= evaluate()
            metrics["seconds"] = time.perf_counter() - begin
        self.job.module.train()
        metrics = distributed.said_by_first(metrics)
        if "seconds" in metrics:
            self.log.write("evaluate", step, metrics)
            self.log.evaluated.add(step)
            self.reporter.evaluated(step, metrics)
            self.metrics = metrics
            self._judge(metrics)

    def _recall_best(self) -> Best | None:
        """The best evaluation so far, and into the counters how many came after it: a kill may have come between an
        evaluation and the checkpoint that knows of it."""
        name = self.recipe.training.best_metric
        if name is None:
            return None
        evaluations = self.log.evaluations(name)
        best, self.counters.evaluations_since_best = recall(self.run_dir, name, evaluations, self.counters.step)
        if best is not None and distributed.is_first():
            self.keeper.crown(best)
        return best

    def _judge(self, metrics: Metrics) -> None:
        """Keeps the checkpoint of an evaluation that is the best so far."""
        name = self.recipe.training.best_metric
        if name is None:
            return
        if name not in metrics:
            there = ", ".join(sorted(metrics.keys() - {"seconds"}))
            raise BadRecipe(f"training.best_metric: evaluations give no {name}; they give {there}.")
        if not better(name, metrics[name], self.best):
            self.counters.evaluations_since_best += 1
            return
        self.counters.evaluations_since_best = 0
        self.best = Best(self.counters.step, name, metrics[name])
        self._save_and_go_on(self.best)

    # Checkpoints

    def _take_up(self, checkpoint: Path) -> Counters:
        checkpoints.restore(checkpoint, self.job.module, self.optimizer)
        if self.average:
            self.average.restore(checkpoints.load_average(checkpoint) or checkpoints.trainable_state(self.job.module))
        saved = checkpoints.read_state(checkpoint)
        texts = saved.get("texts") or {}
        self._changed = sorted(name for name, told in self.job.texts.items() if texts.get(name, told) != told)
        if self.job.faults and saved.get("faults"):
            self.job.faults.load_state_dict(saved["faults"])
        return Counters(**saved["counters"])

    def _save(self, best: Best | None = None) -> None:
        """Takes a snapshot and begins to write it; `best` is noted once it is there."""
        if not distributed.is_first():
            return
        step = self.counters.step
        saved = {
            "step": step,
            "samples": step * self.recipe.training.batch_size,
            "learning_rate": learning_rate(max(0, step - 1), self.recipe.optimizer, self.recipe.training.steps),
            "precision": self.precision,
            "torch": torch.__version__,
            "counters": dataclasses.asdict(self.counters),
            "ranks": distributed.world_size(),
            "faults": self.job.faults.state_dict() if self.job.faults else None,
            "texts": dict(self.job.texts),
            "recipe": to_settings(self.recipe),
        }
        average = self.average.state() if self.average else None
        self.keeper.save(checkpoints.take_snapshot(self.job.module, self.optimizer, saved, average), best)

    def _save_and_go_on(self, best: Best | None = None) -> None:
        """Saves; a full disk costs a checkpoint, not the run."""
        with self.watch.resting():
            try:
                self._save(best)
            except OSError as fault:  # of the checkpoint before
                self._say_not_saved(fault)
                self._save(best)
            if distributed.is_first():
                self.painter.draw()

    def _wait_for_checkpoint(self) -> None:
        try:
            self.keeper.wait()
        except OSError as fault:
            self._say_not_saved(fault)

    def _say_not_saved(self, fault: OSError) -> None:
        self.reporter.say(f"Could not save a checkpoint ({fault.strerror}); older checkpoints stand.")

    def _end(self, stop: StopSignals) -> Summary:
        counters, steps = self.counters, self.recipe.training.steps
        is_early = counters.step < steps and not (stop.asked or self._was_told_to_stop)
        self._wait_for_checkpoint()
        with self.watch.resting():
            self._save()
            path = self.keeper.wait() or checkpoints.checkpoint_path(self.run_dir, counters.step)
            if distributed.is_first():
                self.painter.draw(at_once=is_early or counters.step >= steps)  # one that is told to stop leaves soon
            distributed.wait_for_all()
        if self.job.faults and self.job.faults.num_faults:
            self.reporter.say(f"{self.job.faults.summary()}. They are listed in {self.job.faults.path}.")
        if is_early and self.best is not None:
            self.reporter.say(f"{self.best.metric} got no better since step {self.best.step}: stopped early.")
        if counters.step < steps and not is_early:
            by = stop.asked or "a signal to another process"
            self.reporter.say(f"Stopped by {by} after step {counters.step} of {steps}; saved as {path}.")
            how = "Run the same command again" + ("" if self._goes_on_by_itself else ", without --resume,")
            self.reporter.say(f"{how} to go on from there.")
        else:
            self.reporter.say(f"Finished {counters.step} steps in {duration(counters.seconds)}; saved as {path}.")
        return Summary(
            step=counters.step,
            finished=counters.step >= steps or is_early,
            skipped=counters.skipped,
            checkpoint=path,
            metrics=self.metrics,
            stopped_by=stop.asked if counters.step < steps and not is_early else "",
        )

    def _opening(self, start: Path | None) -> Iterator[str]:
        """What there is to say before the first step."""
        optimizer, training = self.recipe.optimizer, self.recipe.training
        count = sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])
        ranks = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        yield f"{self.recipe.name}: {count:,} trainable parameters, {self.precision} on {self.device}{ranks}"
        yield f"Into {self.run_dir}"
        if start:
            yield f"Going on from {start} (step {self.counters.step} of {training.steps})"
        for name in self._changed:
            yield f"{name} holds other samples than up to now: the run goes on with them, and is another than was begun"
        if optimizer.warmup_steps >= training.steps:
            peak = learning_rate(training.steps - 1, optimizer, training.steps)
            yield f"The warm-up ({optimizer.warmup_steps} steps) outlasts the run: the learning rate ends at {peak:.2g}"


def _no_room(run_dir: Path, fault: OSError) -> str:
    return (
        f"Could not write into {run_dir} ({fault.strerror}). The last checkpoint is "
        f"{checkpoints.newest_checkpoint(run_dir) or 'none'}. Make room and run the same command again."
    )
