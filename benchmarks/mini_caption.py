"""One caption of the mini model beside transformers' `generate` on the same parts, and 64 in one call: docs/speed.md.

    python benchmarks/mini_caption.py --work build/mini

Both sides take turns on each picture of examples/pictures, in one process, with the same weights in float32; greedy,
and as `blip2 caption` does by default, the best of 8 beams by the retrieval part. Nothing is kept between captions.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import blip2
from blip2.evaluation.speed import Contender, PlainSpeaker, machine

PICTURES = sorted((Path(__file__).parents[1] / "examples" / "pictures").glob("*.[jw]*[gp]"))
MANY = 64
LONGEST = 30


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    peer = PlainSpeaker(Contender("plain", args.model))
    ours = blip2.load(args.model)
    ours.image_cache.max_bytes = ours.generator.image_cache.max_bytes = 0
    prompts = ours.settings.prompts
    best_of = ours.settings.caption_best_of

    def say(images: list[Path], **options: Any) -> list[str]:
        return peer.generate(images, prompts.caption, prompts.caption_instruction, max_new_tokens=LONGEST, **options)

    def choose(images: list[Path]) -> list[str]:
        said = say(images, num_beams=best_of, num_return_sequences=best_of, length_penalty=0.0)
        proposed = [said[i : i + best_of] for i in range(0, len(said), best_of)]
        return ours.retriever.best_fitting(ours.image_features(images), proposed)

    found: dict[str, Any] = {"machine": machine(), "pictures": len(PICTURES), "runs": args.runs}
    found["greedy"] = _in_turns(lambda image: ours.caption(image, best_of=1), lambda image: say([image])[0], args.runs)
    found[f"best of {best_of}"] = _in_turns(ours.caption, lambda image: choose([image])[0], args.runs)
    many = (PICTURES * MANY)[:MANY]
    rates = {"ours": _rate(lambda: ours.caption(many, best_of=1), args.runs)}
    for size in (4, 8, 16, 32, 64):
        batches = [many[i : i + size] for i in range(0, MANY, size)]
        rates[f"bare, {size}"] = _rate(lambda batches=batches: [say(batch) for batch in batches], args.runs)
    found["captions a second, 64 pictures"] = rates
    found["ours to the best bare rate"] = rates["ours"] / max(rate for name, rate in rates.items() if name != "ours")
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "mini_caption.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


@torch.inference_mode()
def _in_turns(ours: Callable[[Path], str], peer: Callable[[Path], str], runs: int) -> dict[str, Any]:
    """Seconds of both for each picture, medians over runs and pictures, and how many texts are equal."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    equal = 0
    for run in range(-1, runs):  # the first round warms up
        for picture in PICTURES:
            texts = []
            for name, work in (("ours", ours), ("peer", peer)):
                begin = time.perf_counter()
                texts.append(work(picture))
                if run >= 0:
                    seconds[name].append(time.perf_counter() - begin)
            equal += run == 0 and texts[0] == texts[1]
        _tell(f"round {run + 1} of {runs} is done")
    ratios = [peer / own for own, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
    return {
        "ours": statistics.median(seconds["ours"]),
        "peer": statistics.median(seconds["peer"]),
        "times faster": statistics.median(seconds["peer"]) / statistics.median(seconds["ours"]),
        "median of the pairs' ratios": statistics.median(ratios),
        "equal texts": f"{equal} of {len(PICTURES)}",
    }


def _rate(work: Callable[[], object], runs: int) -> float:
    taken = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    rate = MANY / statistics.median(taken)
    _tell(f"{rate:.1f} captions a second")
    return rate


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
