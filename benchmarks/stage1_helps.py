"""Generative learning with and without stage 1, same budget (the paper's figure 5): trains, draws and prints both.

    python benchmarks/stage1_helps.py --start mini-stage1 --at-once 2 --out docs/images/stage1-helps.png

An hour for both at once, one thread and 8 GB of memory each.
Needs the open training set (`blip2 data build`) and a finished stage 1 (`blip2 train mini/stage1`), or a model folder
that holds one. The paper draws the accuracy of answers; so does this, on scenes that training never saw. Both runs go
on where they stood if they are broken off.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blip2 import paths
from blip2.training.plots import compare_runs

WITH, WITHOUT = "with stage 1", "without stage 1"
DRAWN = "new_scenes/exact"
TOLD = {DRAWN: "answers right, new scenes", "held_out_style/loss": "loss on captions of the held-out style"}


def main() -> None:
    """Trains, then compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--start", default="mini-stage1", help="a run of stage 1, or a model folder that holds one")
    parser.add_argument("--recipe", default="mini/instruct")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps of each run")
    parser.add_argument("--set", action="append", default=[], help="a setting of both runs, as of blip2 train")
    parser.add_argument("--at-once", type=int, default=1, choices=(1, 2), help="2: both at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("docs/images/stage1-helps.png"))
    args = parser.parse_args()
    with ThreadPoolExecutor(args.at_once) as pool:
        lines = pool.map(lambda label: _run(label, args), (WITH, WITHOUT))
    runs = dict(zip((WITH, WITHOUT), lines, strict=True))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    compare_runs(runs, DRAWN, args.out, title=f"{args.recipe}: {TOLD[DRAWN]}")
    measured = {label: [line for line in lines if line["kind"] == "evaluate"] for label, lines in runs.items()}
    for name, meaning in TOLD.items():
        for label, lines in measured.items():
            values = ", ".join(f"{line['step']}: {line[name]:.3f}" for line in lines)
            print(f"{meaning}, {label}: {values}")


def _run(label: str, args: argparse.Namespace) -> list[dict]:
    folder = paths.runs_dir() / f"{args.recipe.rpartition('/')[2]}-{label.replace(' ', '-')}"
    changes = [
        f"model.init_from={json.dumps(args.start if label == WITH else None)}",
        f"training.steps={args.steps}",
        f"training.evaluate_every={args.steps // 5}",
        "training.batch_size=32",
        "training.answer_samples=96",
        f"training.threads={1 if args.at_once == 2 else 'null'}",
        *args.set,
    ]
    command = [Path(sys.executable).with_name("blip2"), "train", args.recipe, "--out", folder]
    subprocess.run([*command, *(part for change in changes for part in ("--set", change))], check=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
