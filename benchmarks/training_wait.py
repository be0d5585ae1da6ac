"""How much of training waits for its data: the share of a run's time in which the loop has no batch yet.

    python benchmarks/training_wait.py --work build/wait

Runs the recipe of the mini stage 1 through `blip2.training`'s own loop on generated JPEG pictures in shards, or with
`--data` on a data set that is there, and reads the run's metrics.jsonl: each line's `waiting_share`. The aim is 5 % at
most, start included; the status is 1 where it is missed. The frozen parts are those of `blip2 train mini/stage1`, and
image features go to the cache of blip2's home, as in any run.
"""

import argparse
import io
import itertools
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip2.data.sample import Sample
from blip2.data.shards import write_manifest, write_split
from blip2.errors import Blip2Error
from blip2.evaluation.speed import machine
from blip2.training.build import build
from blip2.training.loop import train
from blip2.training.progress import read_metrics
from blip2.training.recipe import Recipe, apply_overrides, read_recipe

AIM = 0.05
KEY = "waiting_share"
SEED = 20
PICTURE = (320, 240)  # width and height, pixels
WORDS = "a red blue green small large round square dog cat house tree car on near under with two three boats".split()
OURS = {"data.validation": [], "model.init_from": None}


def main() -> None:
    """Makes the data set if it is not there, trains, reads the log, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data set and the run")
    parser.add_argument("--recipe", default="mini/stage1")
    parser.add_argument("--data", type=Path, help="a data set instead of generated pictures")
    parser.add_argument("--split", default="train", help="of --data")
    parser.add_argument("--pictures", type=int, default=600, help="how many are generated")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--set", action="append", default=[], help="a setting of the run, as of blip2 train")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    try:
        found = _measure(args)
    except Blip2Error as fault:
        raise SystemExit(str(fault)) from None
    print(
        f"waiting for batches: {found['share']:.2%} of the time of {found['steps']} steps "
        f"(per log line {found['least']:.2%}-{found['most']:.2%}, the first {found['first']:.2%}); the aim is {AIM:.0%}"
    )
    print(f"{found['samples_per_second']:.1f} samples a second; machine {found['machine']}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(found["share"] > AIM)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    data = args.data or generated(args.work / f"data-{args.pictures}", args.pictures)
    recipe = _recipe(args, data)
    run_dir = args.work / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    train(build(recipe, run_dir), recipe, run_dir, resume="never")
    return waiting(run_dir) | {"machine": machine()}


def _recipe(args: argparse.Namespace, data: Path) -> Recipe:
    mixture = [{"split": args.split, "num_views": 2, "flip": True}]
    settings = OURS | {"data.folder": str(data.resolve()), "data.mixture": mixture}
    settings |= {"training.steps": args.steps, "training.batch_size": args.batch}
    settings |= {"training.log_every": max(1, args.steps // 8), "training.checkpoint_every": args.steps}
    settings |= {"optimizer.warmup_steps": 1, "training.evaluate_every": 0}
    told = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
    return apply_overrides(read_recipe(args.recipe), [*told, *args.set])


def waiting(run_dir: Path) -> dict[str, Any]:
    """Shares of waiting in a run's log: of the whole run, and of its lines.

    Raises:
        SystemExit: the log does not tell.
    """
    lines = [line for line in read_metrics(run_dir) if line["kind"] == "train"]
    if not lines or not all(KEY in line for line in lines):
        raise SystemExit(f"{run_dir}/metrics.jsonl has no {KEY}: its loop does not count the time it waits.")
    ends = [line["seconds"] for line in lines]
    spans = [end - begin for begin, end in itertools.pairwise([0.0, *ends])]
    shares = [line[KEY] for line in lines]
    return {
        "share": sum(share * span for share, span in zip(shares, spans, strict=True)) / ends[-1],
        "first": shares[0],
        "least": min(shares[1:] or shares),
        "most": max(shares[1:] or shares),
        "steps": lines[-1]["step"],
        "samples_per_second": lines[-1]["samples_per_second"],
    }


def generated(folder: Path, count: int) -> Path:
    """A data set of smooth random JPEG pictures with random captions, made once; the same ones every time."""
    if not (folder / "manifest.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shards = write_split(folder, "train", _samples(count), per_shard=200)
        write_manifest(folder, "generated", {"train": shards})
    return folder


def _samples(count: int) -> Iterator[Sample]:
    words, numbers = random.Random(SEED), np.random.default_rng(SEED)
    for number in range(count):
        coarse = Image.fromarray(numbers.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize(PICTURE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        caption = " ".join(words.choices(WORDS, k=words.randint(5, 12)))
        yield Sample(image=file.getvalue(), captions=(caption,), id=f"{number:06d}", source="generated")


if __name__ == "__main__":
    main()
