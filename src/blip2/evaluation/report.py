"""Metrics as a table for people, a JSON file for programs and bars for a glance."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Metrics = Mapping[str, float]
HEADINGS = ("", "used", "ours", "at least", "goal", "", "beside it")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        title: what is measured, in words.
        key: its metric.
        beside: label -> metric of what it is to be compared with.
        wanted: what it must reach.
        goal: what it should reach.
        at_most_below: (metric, margin): it must lie at least the margin below that metric.
    """

    title: str
    key: str
    beside: Mapping[str, str] = field(default_factory=dict)
    wanted: float | None = None
    goal: float | None = None
    at_most_below: tuple[str, float] | None = None


@dataclass(frozen=True)
class Bars:
    """A panel of bars: `names` along the axis, one colour for each of `series` (label -> prefix of the metrics)."""

    title: str
    names: tuple[str, ...]
    series: Mapping[str, str]


def table(rows: Sequence[Row], metrics: Metrics, counts: Mapping[str, tuple[int, int]]) -> list[tuple[str, ...]]:
    """The cells under HEADINGS of the rows that were measured; fractions in percent.

    Args:
        rows: what to show.
        metrics: name -> fraction.
        counts: prefix of metrics -> (used, there are).
    """
    return [_cells(row, metrics, counts) for row in rows if row.key in metrics]


def _cells(row: Row, metrics: Metrics, counts: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    value = metrics[row.key]
    used, total = counts.get(row.key.rpartition("/")[0], (0, 0))
    limit, verdict = _limit(row, metrics)
    beside = [f"{label} {_percent(metrics[key])}" for label, key in row.beside.items() if key in metrics]
    return (
        row.title,
        f"{used:,}" if used == total else f"{used:,} of {total:,}",
        _percent(value),
        limit,
        _percent(row.goal) if row.goal is not None else "",
        verdict,
        ", ".join(beside),
    )


def _limit(row: Row, metrics: Metrics) -> tuple[str, str]:
    """What the row must reach, and "missed" where it does not."""
    value = metrics[row.key]
    if row.at_most_below is not None and row.at_most_below[0] in metrics:
        most = metrics[row.at_most_below[0]] - row.at_most_below[1]
        return f"<= {_percent(most)}", "missed" if value > most else ""
    if row.wanted is not None:
        return _percent(row.wanted), "missed" if value < row.wanted else ""
    return "", ""


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def as_text(cells: Sequence[tuple[str, ...]]) -> str:
    """The table in columns, for a terminal."""
    return as_columns([HEADINGS, *cells], is_text={0, 5, 6})


def as_columns(lines: Sequence[tuple[str, ...]], *, is_text: Collection[int]) -> str:
    """Rows of cells in columns, those of text to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in is_text else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_markdown(cells: Sequence[tuple[str, ...]]) -> str:
    """The table in Markdown."""
    return as_pipes([HEADINGS, ("---", "--:", "--:", "--:", "--:", "---", "---"), *cells])


def as_pipes(lines: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells, the second of which is the rule, as a table of Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def save(
    folder: Path,
    cells: Sequence[tuple[str, ...]],
    metrics: Metrics,
    counts: Mapping[str, tuple[int, int]],
    plots: Mapping[str, Sequence[Bars]],
    about: Mapping[str, Any],
) -> list[Path]:
    """Writes evaluation.json, table.md and, where matplotlib is installed, the plots of what was measured.

    Args:
        folder: made where it is missing.
        cells: from `table`.
        metrics, counts: as in `table`.
        plots: file name -> panels.
        about: what was measured and how; stands in evaluation.json beside the metrics.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = dict(about) | {"metrics": dict(metrics), "counts": {key: list(pair) for key, pair in counts.items()}}
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    written = [
        write_whole(folder / "evaluation.json", text),
        write_whole(folder / "table.md", as_markdown(cells)),
    ]
    for name, panels in plots.items():
        measured = [
            panel for panel in panels if any(_values(panel, prefix, metrics) for prefix in panel.series.values())
        ]
        if measured and can_draw():
            draw(measured, metrics, folder / name)
            written.append(folder / name)
    return written


def can_draw() -> bool:
    """Whether matplotlib, of the extra `train`, is installed."""
    return find_spec("matplotlib") is not None


def draw(panels: Sequence[Bars], metrics: Metrics, path: Path) -> None:
    """Draws panels of bars side by side as a PNG file; what was not measured leaves a gap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 5.5 * len(panels)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        series = {label: _values(panel, prefix, metrics) for label, prefix in panel.series.items()}
        series = {label: values for label, values in series.items() if values}
        names = [name for name in panel.names if any(name in values for values in series.values())]
        width = 0.8 / len(series)
        for number, (label, values) in enumerate(series.items()):
            places = [i + (number - (len(series) - 1) / 2) * width for i, name in enumerate(names) if name in values]
            heights = [100 * values[name] for name in names if name in values]
            axis.bar(places, heights, width, label=label)
        axis.set_xticks(range(len(names)), [_tick(name) for name in names], fontsize=8)
        axis.set_title(panel.title, fontsize=10)
        axis.set_ylim(0, 100)
        axis.set_ylabel("%")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a figure of matplotlib as a PNG file, beside its place first; gives the path."""
    beside = path.with_name(f".{path.name}.writing")
    figure.savefig(beside, format="png", dpi=110)
    os.replace(beside, path)
    return path


def _values(panel: Bars, prefix: str, metrics: Metrics) -> dict[str, float]:
    return {name: metrics[f"{prefix}/{name}"] for name in panel.names if f"{prefix}/{name}" in metrics}


def _tick(name: str) -> str:
    """image_to_text_r1 -> two lines: image to text, R@1."""
    front, _, last = name.rpartition("_")
    if last[:1] == "r" and last[1:].isdigit():
        return f"{front.replace('_', ' ')}\nR@{last[1:]}"
    return name.replace("_", " ")


def write_whole(path: Path, text: str) -> Path:
    """Writes a file beside its place and moves it there, so that a reader finds it whole; gives the path."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return path
