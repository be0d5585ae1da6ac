"""What `evaluation.speed` found, as a table for people, JSON for programs and bars for a glance."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2.evaluation.report import as_columns, as_pipes, can_draw, save_figure, write_whole

TITLES = {
    "vision": "image encoder",
    "first_token": "picture to first word",
    "second_question": "second question to first word",
    "token": "each further word",
    "caption": "whole caption",
    "start": "start to first word",
    "peak_bytes": "peak memory",
    "own_bytes": "memory without mapped files",
    "gpu_bytes": "peak memory of the GPU",
}


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Heading and cells: for each measure the contenders' medians with their range, and the ratio."""
    contenders = found["contenders"]
    table = [("", *(contender["name"] for contender in contenders), "times faster, or less")]
    names = [name for name in contenders[0]["measures"] if all(name in one["measures"] for one in contenders)]
    for name in sorted(names, key=_place):
        cells = [_cell(name, contender["measures"][name]) for contender in contenders]
        table.append((_title(name), *cells, f"{found['ratios'][contenders[0]['name']][name]:.2f}"))
    table.append(
        ("texts equal to the last one's", *(f"{found['same_text'][one['name']]:.0%}" for one in contenders), "")
    )
    return table


def as_text(found: Mapping[str, Any]) -> str:
    """The table in columns, and below it what it ran on."""
    return f"{as_columns(rows(found), is_text={0})}\n\n{_about(found)}"


def as_markdown(found: Mapping[str, Any]) -> str:
    """The same for a document."""
    heading, *rest = rows(found)
    return f"{as_pipes([heading, ('---', *['--:'] * (len(heading) - 1)), *rest])}\n{_about(found)}\n"


def save(folder: Path, found: Mapping[str, Any]) -> list[Path]:
    """Writes bench.json, bench.md and, where matplotlib is installed, bench.png; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        write_whole(folder / "bench.json", json.dumps(found, indent=1) + "\n"),
        write_whole(folder / "bench.md", as_markdown(found)),
    ]
    if can_draw():
        written.append(_draw(found, folder / "bench.png"))
    return written


def _draw(found: Mapping[str, Any], out: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    contenders: Sequence[Mapping[str, Any]] = found["contenders"]
    names = ["vision", "first_token", "second_question", "caption"]
    figure = Figure(figsize=(8, 1 + 0.9 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    height = 0.8 / len(contenders)
    for i, contender in enumerate(contenders):
        taken = [contender["measures"][name] for name in names]
        medians = [one["median"] for one in taken]
        spread = [[one["median"] - one["least"] for one in taken], [one["most"] - one["median"] for one in taken]]
        places = [place + i * height for place in range(len(names))]
        bars = axis.barh(places, medians, height, xerr=spread, label=contender["name"], error_kw={"linewidth": 0.8})
        axis.bar_label(bars, [_seconds(value) for value in medians], fontsize=8, padding=4)
    axis.set_yticks(
        [place + height * (len(contenders) - 1) / 2 for place in range(len(names))], [_title(n) for n in names]
    )
    axis.invert_yaxis()
    axis.set_xlabel("seconds; bars are medians, lines go from the least to the most")
    axis.margins(x=0.12)
    axis.legend(fontsize=8)
    return save_figure(figure, out)


def _place(name: str) -> int:
    known = list(TITLES)
    return known.index(name) if name in known else known.index("start")


def _title(name: str) -> str:
    return TITLES.get(name) or f"a picture of {name.rpartition('_')[2]} in one call"


def _cell(name: str, taken: Mapping[str, Any]) -> str:
    if name.endswith("_bytes"):
        return f"{taken['median'] / 1e9:.2f} GB"
    if taken["least"] == taken["most"]:
        return _seconds(taken["median"])
    return f"{_seconds(taken['median'])} ({_seconds(taken['least'])}-{_seconds(taken['most'])})"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _about(found: Mapping[str, Any]) -> str:
    machine, plan = found["machine"], found["plan"]
    return (
        f"Medians (least to most) of {plan['runs']} rounds in turns, captions of {plan['num_tokens']} words. "
        f"{machine['date']}, {machine['gpu'] or machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, transformers {machine['transformers']}."
    )
