"""Curves of a run, and of several runs together, as PNG files."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blip2.errors import BadData, MissingPart

Line = Mapping[str, Any]


def can_draw() -> bool:
    """Whether matplotlib, of the extra `train`, is installed."""
    return find_spec("matplotlib") is not None


def draw_run(lines: Sequence[Line], out: Path) -> None:
    """Draws a run's losses, its other metrics and its evaluations; nothing where there are no lines yet.

    Args:
        lines: of metrics.jsonl.
        out: PNG file to write.
    """
    train = [line for line in lines if line["kind"] == "train"]
    tests = [line for line in lines if line["kind"] == "evaluate"]
    hidden = {"kind", "step", "seconds", "samples_per_second", "waiting_share", "skipped", "bad_samples"}
    names = sorted({name for line in train for name in line} - hidden)
    losses = [name for name in names if "loss" in name or name in ("itc", "itm", "itg")]
    panels = [("losses", train, losses)]
    panels += [(name, train, [name]) for name in names if name not in losses]
    panels += [(name, tests, [name]) for name in sorted({name for line in tests for name in line} - hidden)]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    figure, axes = _panels(len(panels))
    for axis, (title, source, keys) in zip(axes, panels, strict=False):
        for key in keys:
            steps, values = _curve(source, key)
            axis.plot(steps, values, label=key, linewidth=1, marker="." if len(steps) < 30 else "")
        axis.set_title(title, fontsize=9)
        if len(keys) > 1:
            axis.legend(fontsize=7)
    _save(figure, out)


def compare_runs(runs: Mapping[str, Sequence[Line]], key: str, out: Path, title: str = "") -> None:
    """Draws one metric of several runs over their steps.

    Args:
        runs: label -> lines of that run's metrics.jsonl.
        key: the metric, of training or of evaluation.
        out: PNG file to write.
        title: above the curves; the metric's name if empty.

    Raises:
        MissingPart: matplotlib is not installed.
        BadData: a run without that metric.
    """
    if not can_draw():
        raise MissingPart("Drawing needs matplotlib: pip install 'blip2[train]'.")
    figure, (axis,) = _panels(1)
    for label, lines in runs.items():
        steps, values = _curve(lines, key)
        if not steps:
            known = sorted({name for line in lines for name in line} - {"kind", "step"})
            raise BadData(f"The run {label} has no metric {key}. It has: {', '.join(known)}.")
        axis.plot(steps, values, label=label, linewidth=1.5, marker="." if len(steps) < 30 else "")
    axis.set_title(title or key)
    axis.set_xlabel("step")
    axis.set_ylabel(key)
    axis.legend()
    _save(figure, out)


def _curve(lines: Sequence[Line], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in points], [value for _, value in points]


def _panels(count: int) -> tuple[Any, Any]:
    """A figure without a display, and its axes in rows of at most three."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(6, 4 * columns), 3 * rows if count > 1 else 4))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=0.12 / columns + 0.02, right=0.98, top=0.9, bottom=0.12 / rows + 0.02, hspace=0.4, wspace=0.3
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.set_axis_off()
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    return figure, axes[:count]


def _save(figure: Any, out: Path) -> None:
    beside = out.with_name(f".{out.name}.writing")
    figure.savefig(beside, format="png", dpi=110)
    beside.replace(out)
