"""The training loop: step, accumulate, clip, log, evaluate, save, stop.

    batches(i) --(one ahead)--> forward, backward --> clip --> AdamW --> log . checkpoint . evaluate
                                     |                 |
                                     +-- not finite? --+--> nothing changes, the skip is counted

All that a step draws at random follows from (recipe.seed, step), and its samples from their positions. So a checkpoint
needs no reader's state, and a resumed run repeats the uninterrupted one bit for bit on a CPU.
"""

import base64
import dataclasses
import errno
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blip2.errors import BadRecipe, Blip2Error
from blip2.training import state as checkpoints
from blip2.training.compiled import without_compiling
from blip2.training.optimizer import build_optimizer, learning_rate
from blip2.training.prefetch import prefetched
from blip2.training.progress import CurvePainter, MetricsLog, Reporter, duration
from blip2.training.recipe import Recipe, differences, recipe_from_settings, to_settings, to_yaml
from blip2.training.signals import BrokenOff, StopSignals

MOST_SKIPS_IN_A_ROW = 20
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FREE_TO_CHANGE = {"name", "training.log_every", "training.checkpoint_every", "training.keep", "training.evaluate_every"}

Metrics = dict[str, float]


@dataclass
class Job:
    """What a run trains, on what, and how it is judged.

    Attributes:
        module: forward(batch) gives scalars by name; "loss" is minimised, the others are logged.
        batches: index -> batch, the same for the same index. Batch i holds the samples at the run's positions
            i * micro_batch_size ... (i + 1) * micro_batch_size - 1, and a step takes `accumulation` batches in turn.
            Called in another thread: it must not draw from torch's global generator.
        evaluators: (every so many steps, function giving metrics); each runs after the last step too, and 0 means only
            then. The module is in eval mode meanwhile, and no gradients are recorded.
    """

    module: nn.Module
    batches: Callable[[int], Any]
    evaluators: Sequence[tuple[int, Callable[[], Mapping[str, float]]]] = ()


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        step: steps made in all.
        finished: whether these are all of the recipe's steps; if not, the run was told to stop.
        skipped: steps that changed nothing, since loss or gradient were not finite.
        checkpoint: the last one.
        metrics: of the last evaluation, else of the last log line.
    """

    step: int
    finished: bool
    skipped: int
    checkpoint: Path
    metrics: Metrics


@dataclass
class Counters:
    """What a run counts; saved with each checkpoint."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
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
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    with checkpoints.only_writer(run_dir):
        run = Run(job, recipe, run_dir, resume)
        try:
            return run.go()
        except OSError as fault:
            if fault.errno in NO_ROOM:
                raise Blip2Error(_no_room(run_dir, fault)) from None
            raise
        finally:
            run.close()


class Run:
    """A run under way: the job, its optimizer, its counters and where it reports."""

    def __init__(self, job: Job, recipe: Recipe, run_dir: Path, resume: str | Path):
        self.job, self.recipe, self.run_dir = job, recipe, run_dir
        self.optimizer = build_optimizer(job.module, recipe.optimizer)
        self.device = next(job.module.parameters()).device
        self.precision = resolve_precision(recipe.training.precision, self.device)
        start = checkpoints.choose_start(run_dir, resume)
        notices = _check_same_recipe(start, recipe, run_dir, resume) if start else []
        self.counters = Counters() if start is None else self._take_up(start)
        notices += [
            f"Removed {path}: torn, or past the start"
            for path in checkpoints.discard_after(run_dir, self.counters.step)
        ]
        (run_dir / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        self.log = MetricsLog(run_dir, self.counters.step)
        self.painter = CurvePainter(run_dir)
        self.reporter = Reporter(recipe.training.steps, self.counters.step)
        self.metrics: Metrics = {}
        self._last_line = (self.counters.step, self.counters.seconds)
        for line in [*notices, *self._opening(start)]:
            self.reporter.say(line)

    def go(self) -> Summary:
        """Makes the steps that are left."""
        counters, training = self.counters, self.recipe.training
        self.job.module.train()
        with StopSignals() as stop, prefetched(self._step_batches, counters.step, training.steps) as batches:
            self._evaluate_if_due(stop)  # a run stopped during an evaluation makes up for it
            while counters.step < training.steps and not stop.asked:
                begin = time.perf_counter()
                outcome = self._step(next(batches))
                self._count(outcome, time.perf_counter() - begin)
                if counters.step % training.log_every == 0 or counters.step == training.steps:
                    self._log_window()
                if counters.step % training.checkpoint_every == 0 and counters.step < training.steps:
                    self._save_and_go_on()
                self._evaluate_if_due(stop)
            return self._end(stop)

    def close(self) -> None:
        """Closes the log and takes the bar away."""
        self.log.close()
        self.reporter.close()

    # One step

    def _step_batches(self, step: int) -> list[Any]:
        parts = self.recipe.training.accumulation
        return [self.job.batches(step * parts + part) for part in range(parts)]

    def _step(self, batches: list[Any]) -> "StepOutcome":
        """One optimiser step, or none where loss or gradient are not finite."""
        section, step = self.recipe.optimizer, self.counters.step
        seed_step(self.recipe.seed, step)
        losses = self._backward(batches)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        metrics = {name: float(value) for name, value in losses.items()} | {"grad_norm": float(norm)}
        is_finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if is_finite:
            if section.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, section.max_grad_norm, norm)
            rate = learning_rate(step, section, self.recipe.training.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(is_finite=is_finite, metrics=metrics)

    def _backward(self, batches: list[Any]) -> dict[str, Tensor]:
        """Gradients of the mean loss of a step's parts; returns the means of what the module gives."""
        total: dict[str, Tensor] = {}
        for batch in batches:
            with self._autocast():
                losses = self.job.module(batch)
            (losses["loss"] / len(batches)).backward()
            for name, value in losses.items():
                part = value.detach().float() / len(batches)
                total[name] = total[name] + part if name in total else part
        return total

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    # Between steps

    def _count(self, outcome: "StepOutcome", seconds: float) -> None:
        counters = self.counters
        counters.step += 1
        counters.seconds += seconds
        self.reporter.stepped(counters.step, seconds)
        if outcome.is_finite:
            counters.skipped_in_a_row = 0
            counters.window_steps += 1
            for name, value in outcome.metrics.items():
                counters.window[name] = counters.window.get(name, 0.0) + value
            return
        counters.skipped += 1
        counters.skipped_in_a_row += 1
        faults = ", ".join(name for name, value in outcome.metrics.items() if not math.isfinite(value))
        self.reporter.say(f"step {counters.step} skipped: {faults} not finite")
        if counters.skipped_in_a_row >= MOST_SKIPS_IN_A_ROW:
            raise Blip2Error(self._diagnosis(faults))

    def _diagnosis(self, faults: str) -> str:
        newest = checkpoints.newest_checkpoint(self.run_dir)
        return (
            f"Stopped at step {self.counters.step}: {faults} was infinite or not a number {MOST_SKIPS_IN_A_ROW} steps "
            "in a row, and nothing was learnt in them. Lower optimizer.learning_rate, set training.precision=float32, "
            f"or look at the samples of these steps. The last checkpoint is {newest or 'none'}."
        )

    def _log_window(self) -> None:
        """One line with the averages since the last one, of the steps that were not skipped."""
        counters, training = self.counters, self.recipe.training
        metrics = {name: total / counters.window_steps for name, total in counters.window.items()}
        metrics["learning_rate"] = learning_rate(counters.step - 1, self.recipe.optimizer, training.steps)
        metrics["skipped"] = counters.skipped
        since, then = self._last_line
        self._last_line = (counters.step, counters.seconds)
        metrics["samples_per_second"] = training.batch_size * (counters.step - since) / (counters.seconds - then)
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
        if not due or step in self.log.evaluated or stop.asked:
            return
        if step == steps:
            self._save_and_go_on()  # the work is safe before anything else can fail
        begin = time.perf_counter()
        metrics: Metrics = {}
        self.job.module.eval()
        with suppress(BrokenOff), stop.breaking_off(), without_compiling(), torch.no_grad():
            for evaluate in due:
                metrics |= evaluate()
            metrics["seconds"] = time.perf_counter() - begin
        self.job.module.train()
        if "seconds" in metrics:
            self.log.write("evaluate", step, metrics)
            self.log.evaluated.add(step)
            self.reporter.evaluated(step, metrics)
            self.metrics = metrics

    # Checkpoints

    def _take_up(self, checkpoint: Path) -> Counters:
        checkpoints.restore(checkpoint, self.job.module, self.optimizer)
        saved = checkpoints.read_state(checkpoint)
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(saved["rng"])), dtype=torch.uint8))
        return Counters(**saved["counters"])

    def _save(self) -> Path:
        step = self.counters.step
        saved = {
            "step": step,
            "samples": step * self.recipe.training.batch_size,
            "learning_rate": learning_rate(max(0, step - 1), self.recipe.optimizer, self.recipe.training.steps),
            "precision": self.precision,
            "torch": torch.__version__,
            "counters": dataclasses.asdict(self.counters),
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "recipe": to_settings(self.recipe),
        }
        path = checkpoints.save_checkpoint(self.run_dir, self.job.module, self.optimizer, saved)
        checkpoints.prune(self.run_dir, self.recipe.training.keep)
        return path

    def _save_and_go_on(self) -> None:
        """Saves; a full disk costs this checkpoint, not the run."""
        try:
            self._save()
        except OSError as fault:
            self.reporter.say(
                f"Could not save at step {self.counters.step} ({fault.strerror}); older checkpoints stand."
            )
        self.painter.draw()

    def _end(self, stop: StopSignals) -> Summary:
        counters, steps = self.counters, self.recipe.training.steps
        path = self._save()
        self.painter.draw(at_once=counters.step >= steps)  # one that is told to stop leaves soon
        if counters.step < steps:
            self.reporter.say(f"Stopped by {stop.asked} after step {counters.step} of {steps}; saved as {path}.")
            self.reporter.say("Run the same command again to go on from there.")
        else:
            self.reporter.say(f"Finished {steps} steps in {duration(counters.seconds)}; saved as {path}.")
        return Summary(
            step=counters.step,
            finished=counters.step >= steps,
            skipped=counters.skipped,
            checkpoint=path,
            metrics=self.metrics,
        )

    def _opening(self, start: Path | None) -> Iterator[str]:
        """What there is to say before the first step."""
        optimizer, training = self.recipe.optimizer, self.recipe.training
        count = sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])
        yield f"{self.recipe.name}: {count:,} trainable parameters, {self.precision} on {self.device}"
        yield f"Into {self.run_dir}"
        if start:
            yield f"Going on from {start} (step {self.counters.step} of {training.steps})"
        if optimizer.warmup_steps >= training.steps:
            peak = learning_rate(training.steps - 1, optimizer, training.steps)
            yield f"The warm-up ({optimizer.warmup_steps} steps) outlasts the run: the learning rate ends at {peak:.2g}"


@dataclass(frozen=True)
class StepOutcome:
    """A step's metrics, and whether it changed the parameters."""

    is_finite: bool
    metrics: Metrics


def seed_step(seed: int, step: int) -> None:
    """Sets torch's generators to what follows from the run's seed and the step alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1))


def resolve_precision(precision: str, device: torch.device) -> str:
    """The arithmetic that "auto" means here: bfloat16 where the processor has matrix units for it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # PyTorch tells of these units only by private names; without them bfloat16 is slower than float32
    has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device.type == "cpu" and has_units else "float32"


def _no_room(run_dir: Path, fault: OSError) -> str:
    return (
        f"Could not write into {run_dir} ({fault.strerror}). The last checkpoint is "
        f"{checkpoints.newest_checkpoint(run_dir) or 'none'}. Make room and run the same command again."
    )


# Resuming


def _check_same_recipe(start: Path, recipe: Recipe, run_dir: Path, resume: str | Path) -> list[str]:
    """What to say about settings that changed since the checkpoint.

    Raises:
        BadRecipe: resuming is automatic, and a setting that decides what is learnt has changed.
    """
    try:
        saved = recipe_from_settings(checkpoints.read_state(start)["recipe"], f"{start}/state.json")
    except BadRecipe:
        if resume == "auto":
            raise
        return ["The checkpoint's recipe is of another version of blip2"]
    changed = {path: pair for path, pair in differences(saved, recipe).items() if path not in FREE_TO_CHANGE}
    told = [f"{path} is {new!r} here, {old!r} there" for path, (old, new) in changed.items()]
    if resume == "auto" and set(changed) - {"training.steps", "training.threads"}:
        raise BadRecipe(
            f"{run_dir} holds a run of another recipe: {'; '.join(told)}. Choose another --out, or say "
            f"--resume {start} to go on from it with the new settings."
        )
    return [f"Changed since the checkpoint: {line}" for line in told]
