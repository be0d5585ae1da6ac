"""Speed and memory at published sizes, quantised and not, beside transformers in the same run: docs/quantization.md.

    python benchmarks/real_size.py opt-2.7b --work build/real

Random weights in the published shapes, since the published weights are on a hub: times and memory do not depend on the
values. OPT-2.7B or FlanT5-XL with ViT-g and the paper's Q-Former, 8 GB on disk in bfloat16 and 4 GB more quantised; all
contenders are in memory at once, 15 GB. With --layers 0.5 both stacks are half as deep, which lets two float32 models
stand beside each other in 16 GB (--unquantised).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from parity.real_sizes import SIZES, make  # noqa: E402

from blip2.checkpoints import quantize  # noqa: E402
from blip2.evaluation import speed, speed_report  # noqa: E402


def main() -> None:
    """Makes what is not there yet, measures, prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and the results")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--batch", type=int, action="append", default=[])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=float, default=1.0, help="share of the layers of both stacks")
    parser.add_argument("--unquantised", action="store_true", help="float32 beside float32, instead of int8 and int4")
    args = parser.parse_args()
    name = args.size if args.layers == 1 else f"{args.size}-{args.layers:g}"
    folder = args.work / name
    if not (folder / "config.json").is_file():
        make(folder, args.size, args.layers)
    if args.unquantised:
        contenders = [speed.Contender("blip2", str(folder)), speed.Contender("transformers", str(folder))]
    else:
        contenders = []
        for bits in ("int4", "int8"):
            small = args.work / f"{name}-{bits}"
            if not small.is_dir():
                print(f"quantising to {bits}", file=sys.stderr)
                quantize.write(folder, str(folder), small, bits, group_size=args.group_size)
            contenders.append(speed.Contender("blip2", str(small)))
        contenders.append(speed.Contender("transformers", str(folder), dtype="bfloat16"))
    plan = speed.Plan(args.runs, args.tokens, tuple(args.batch))
    found = speed.compare(contenders, plan, lambda text: print(text, file=sys.stderr))
    speed_report.save(args.work / f"{name}{'-float32' if args.unquantised else ''}-results", found)
    print(speed_report.as_text(found))


if __name__ == "__main__":
    main()
