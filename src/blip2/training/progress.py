"""What a run tells: lines or a bar on standard error, metrics.jsonl, TensorBoard, and the drawn curves.

    RUN/metrics.jsonl     one object a line: {"kind": "train" | "evaluate", "step": ..., the metrics, the timing}
    RUN/tensorboard/      the same, if tensorboard is installed
    RUN/loss.png          the same, drawn, if matplotlib is installed

A resumed run first drops the lines past the step it resumes from, so that the file equals an uninterrupted run's but
for the fields in TIMING.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from blip2.training import plots

TIMING = ("seconds", "samples_per_second", "waiting_share")
COUNTS = ("skipped", "bad_samples")  # said where there are any
WORTH_SAYING = 0.05  # the share of its time that a run may wait for data unsaid
REDRAW_SECONDS = 60  # drawing takes about a second


class MetricsLog:
    """metrics.jsonl and, where installed, TensorBoard's events."""

    def __init__(self, run_dir: Path, resumed_step: int, *, is_read_only: bool = False):
        """Opens the run's log and drops what is past the step it resumes from; `is_read_only` writes nothing."""
        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(run_dir) if line["step"] <= resumed_step] if resumed_step else []
        self._evaluations = [line for line in kept if line["kind"] == "evaluate"]
        self.evaluated = {line["step"] for line in self._evaluations}
        self._file = self._events = None
        if is_read_only:
            return
        _rewrite(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = _open_tensorboard(run_dir / "tensorboard", resumed_step)

    def evaluations(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of a metric up to the step that the run went on from."""
        return [(line["step"], line[name]) for line in self._evaluations if name in line]

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line."""
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **metrics}) + "\n")
        self._file.flush()
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file:
            self._file.close()
        if self._events:
            self._events.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that a kill cut short is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            lines.append(found)
    return lines


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(beside, path)


def _open_tensorboard(folder: Path, resumed_step: int) -> Any:
    """A SummaryWriter that hides older events past the resumed step, or None where tensorboard is not installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # takes a second, and is optional

    return SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)


class Reporter:
    """Tells on standard error how far a run is: a bar on a terminal, else plain lines."""

    def __init__(self, total: int, done: int, stream: TextIO | None = None, *, is_silent: bool = False):
        """A report of `total` steps of which `done` are already behind; `is_silent` tells nobody."""
        self._total = total
        self._seconds_per_step = 0.0
        console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False, markup=False, quiet=is_silent)
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=is_silent or not console.is_terminal,
        )
        self._task = self._bar.add_task("steps", total=total, completed=done, left="")
        self._bar.start()

    def say(self, line: str) -> None:
        """One plain line."""
        self._console.print(line)

    def stepped(self, step: int, seconds: float) -> None:
        """A step has been made, in so many seconds."""
        smooth = self._seconds_per_step
        self._seconds_per_step = 0.95 * smooth + 0.05 * seconds if smooth else seconds
        self._bar.update(self._task, completed=step, left=self._left(step))

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """The averages since the last line."""
        shown = [f"step {step}/{self._total}"]
        shown += [f"{name} {value:.4g}" for name, value in metrics.items() if name not in (*TIMING, *COUNTS)]
        shown.append(f"{metrics['samples_per_second']:.1f} samples/s")
        if metrics["waiting_share"] > WORTH_SAYING:
            shown.append(f"{metrics['waiting_share']:.0%} of the time waiting for data")
        shown += [f"{name.replace('_', ' ')} {metrics[name]:.0f}" for name in COUNTS if metrics.get(name)]
        self.say(" · ".join([*shown, self._left(step)]))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The results of an evaluation."""
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name != "seconds"]
        self.say(" · ".join([f"evaluated at step {step}", *shown]))

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def _left(self, step: int) -> str:
        return f"{duration((self._total - step) * self._seconds_per_step)} left"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


class CurvePainter:
    """Keeps RUN/loss.png up to date, drawing at most once in REDRAW_SECONDS."""

    def __init__(self, run_dir: Path):
        """A painter that draws into the run's folder."""
        self._run_dir = run_dir
        self._drawn = time.monotonic()

    def draw(self, at_once: bool = False) -> None:
        """Draws the curves, unless they were drawn a moment ago."""
        if not at_once and time.monotonic() - self._drawn < REDRAW_SECONDS:
            return
        if plots.can_draw():
            plots.draw_run(read_metrics(self._run_dir), self._run_dir / "loss.png")
        self._drawn = time.monotonic()
