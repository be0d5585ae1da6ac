"""Seconds and memory for each picture from the first to the ten thousandth, in one process: docs/speed.md.

    python benchmarks/flat_cost.py --work build/flat --pictures 10000

Every picture is new. Written are flat_cost.json and flat_cost.png.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import blip2
from blip2.evaluation.report import save_figure
from blip2.evaluation.speed import machine, picture


def main() -> None:
    """Captions, notes seconds and memory of every hundred pictures, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=100)
    args = parser.parse_args()
    model = blip2.load(args.model)
    seconds, memory = [], []
    for first in range(0, args.pictures, args.every):
        images = [picture(first + i) for i in range(args.every)]
        begin = time.perf_counter()
        model.caption(images, best_of=1, max_new_tokens=4, min_new_tokens=4)
        seconds.append((time.perf_counter() - begin) / args.every)
        memory.append(_own_bytes())
        print(f"{first + args.every:6d}  {seconds[-1] * 1000:6.1f} ms a picture  {memory[-1] / 1e9:.3f} GB", flush=True)
    found = {
        "machine": machine(),
        "model": args.model,
        "every": args.every,
        "seconds a picture": seconds,
        "own bytes": memory,
    }
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "flat_cost.json").write_text(json.dumps(found, indent=1) + "\n")
    _draw(found, args.work / "flat_cost.png")


def _own_bytes() -> float:
    """What the process holds without mapped files, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True)
    done = [found["every"] * (i + 1) for i in range(len(found["own bytes"]))]
    upper.plot(done, [1000 * value for value in found["seconds a picture"]], linewidth=1)
    upper.set_ylabel("ms a picture")
    lower.plot(done, [value / 1e9 for value in found["own bytes"]], linewidth=1)
    lower.set_ylabel("GB, without mapped files")
    lower.set_xlabel("pictures captioned in one process")
    for axis in (upper, lower):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
