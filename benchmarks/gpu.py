"""A GPU beside eager transformers and beside what its memory and arithmetic allow: docs/speed.md.

    python benchmarks/gpu.py --work build/gpu

BLIP-2 OPT-2.7B with ViT-g in bfloat16, random weights in the published shapes, both sides with the same weights, in
turns. One picture at a time, 16 and 64 in one call. The start (loading, and recording the passes) is told apart, last.
With `--model FOLDER` it takes any checkpoint in Hugging Face's layout; with `--device cpu` it runs without a GPU.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from parity.real_sizes import make  # noqa: E402

import blip2  # noqa: E402
from blip2.evaluation import speed, speed_report  # noqa: E402

# Operations of a picture in ViT-g's 39 layers and the Q-Former, in OPT-2.7B over 40 positions; OPT's weights.
VISION_FLOPS, PROMPT_FLOPS, WEIGHTS = 521e9 + 12.7e9, 212e9, 2.65e9


def main() -> None:
    """Makes the checkpoint if it is not there, measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the results")
    parser.add_argument("--model", type=Path, help="a checkpoint in Hugging Face's layout instead of OPT-2.7B's size")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", nargs="*", default=[], help="ours with int8 or int4 weights, beside the others")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="of the memory, bytes a second (H200: 4.3e12)")
    parser.add_argument("--flops", type=float, default=790e12, help="in bfloat16, measured for large products")
    args = parser.parse_args()
    folder = args.model or args.work / "opt-2.7b"
    if not (folder / "config.json").is_file():
        make(folder, "opt-2.7b", 1.0, args.device)
    contenders = [
        speed.Contender("blip2", str(folder), args.dtype, device=args.device),
        *(speed.Contender("blip2", str(folder), args.dtype, bits, args.device) for bits in args.quantize),
        speed.Contender("transformers", str(folder), args.dtype, device=args.device),
    ]
    plan = speed.Plan(args.runs, args.tokens, tuple(args.batch))
    found = speed.compare(contenders, plan, lambda text: print(text, file=sys.stderr))
    if args.model is None:
        found["limits, seconds a picture"] = {size: _limit(size, args) for size in (1, *args.batch)}
    print(speed_report.as_text(found), flush=True)
    found["start"] = _start(folder, args)
    speed_report.save(args.work / "gpu-results", found)
    told = ("start", "limits, seconds a picture")
    print(json.dumps({name: found[name] for name in told if name in found}, indent=1))


def _start(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds to load, and to each of the first captions: passes are recorded in some of them."""
    begin = time.perf_counter()
    model = blip2.load(folder, args.device, getattr(torch, args.dtype))
    taken = {"load": time.perf_counter() - begin}
    for seed, name in enumerate(("first caption", "second caption", "third caption", "fourth caption"), 1):
        taken[name] = _seconds(model, seed, args)
    return taken


def _seconds(model: Any, seed: int, args: argparse.Namespace) -> float:
    begin = time.perf_counter()
    model.generate([speed.picture(seed)], speed.FIRST, max_new_tokens=args.tokens, min_new_tokens=args.tokens)
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _limit(size: int, args: argparse.Namespace) -> float:
    """Seconds a picture at half of the arithmetic and three quarters of the bandwidth; a token reads all weights."""
    computed = size * (VISION_FLOPS + PROMPT_FLOPS) / (0.5 * args.flops)
    read = (args.tokens - 1) * 2 * WEIGHTS / (0.75 * args.bandwidth)
    return (computed + read) / size


if __name__ == "__main__":
    main()
