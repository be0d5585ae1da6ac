"""Pictures a second from shards of 256-pixel JPEGs to augmented training tensors, by number of workers.

    python benchmarks/loader.py --work build/loader --pictures 2000

Claim: on two cores at least 500 a second, so that the loader is not what a step waits for. Beside it stand threads in
place of processes, and the parts of one picture's time. CPU time tells the truth on a busy machine, too: two cores
can do 2000 / (CPU ms a picture) a second. Written is loader.json.
"""

import argparse
import io
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from blip2.data.layouts import open_source
from blip2.data.loader import OrderedLoader
from blip2.data.sample import Sample
from blip2.data.shards import write_manifest, write_split
from blip2.evaluation.speed import machine
from blip2.preprocessing.images import ImageTransform, load_image, random_crop_box

SIZE = 224
SHORTER, LONGER = 256, 341  # a photograph of 4:3 as `blip2 data shard --size 256` leaves it
TRANSFORM = ImageTransform(SIZE, (0.481, 0.458, 0.408), (0.269, 0.261, 0.276))


def main() -> None:
    """Makes the shards, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the shards and the results")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    folder = _shards(args.work, args.pictures)
    source = open_source(str(folder))

    def read(position: int) -> torch.Tensor:
        sample = source[position]
        generator = torch.Generator().manual_seed(position)
        return TRANSFORM.augment(load_image(sample.image, name=sample.id), generator)

    def reduced(position: int) -> np.ndarray:
        """The same pixels as bytes, to be normalised where they arrive: a quarter of what is sent."""
        image = load_image(source[position].image)
        box = random_crop_box(image.size, torch.Generator().manual_seed(position))
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))

    cores = os.cpu_count() or 1
    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "in place": lambda: map(read, range(len(source))),
        **{f"{n} worker{'s' * (n > 1)}": _by_workers(read, n, len(source)) for n in sorted({1, 2, cores})},
        f"{cores} workers, uint8": _by_workers(reduced, cores, len(source)),
        f"{cores} threads": _by_threads(read, cores, len(source)),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.runs):  # turn by turn, so that what else the machine does meets all alike
        for name, way in ways.items():
            begin, before = time.perf_counter(), _cpu_seconds()
            count = sum(1 for _ in way())
            rates[name].append(count / (time.perf_counter() - begin))
            work[name].append((_cpu_seconds() - before) / count * 1000)
    print(f"{args.runs} runs, {args.pictures} pictures, {cores} cores")
    print(f"{'way':22} {'pictures/s':>10} {'':14} {'CPU ms a picture':>16}")
    for name, found in rates.items():
        spread = f"{min(found):.0f} to {max(found):.0f}"
        print(f"{name:22} {median(found):10.0f} {spread:14} {median(work[name]):16.2f}")
    parts = _parts(source)
    for name, milliseconds in parts.items():
        print(f"{name:22} {milliseconds:10.3f} CPU ms a picture")
    found = {"machine": machine(), "pictures a second": rates, "cpu ms": work, "ms a picture": parts}
    (args.work / "loader.json").write_text(json.dumps(found, indent=1) + "\n")


def _cpu_seconds() -> float:
    """Of this process and of those that it has ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _by_workers(read: Callable[[int], Any], workers: int, count: int) -> Callable[[], Iterator[Any]]:
    def way() -> Iterator[Any]:
        with OrderedLoader(read, workers=workers, ahead=64) as loader:
            yield from loader.stream(0, count)

    return way


def _by_threads(read: Callable[[int], Any], workers: int, count: int) -> Callable[[], Iterator[Any]]:
    def way() -> Iterator[Any]:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(read, range(count))

    return way


def _parts(source: Any, count: int = 200) -> dict[str, float]:
    """CPU milliseconds of each step of one picture, one after the other in this process."""
    torch.set_num_threads(1)
    samples: list[Sample] = []
    images: list[Image.Image] = []
    crops: list[Image.Image] = []
    tensors: list[torch.Tensor] = []

    def timed(step: Callable[[int], None]) -> float:
        begin = time.process_time()
        for position in range(count):
            step(position)
        return (time.process_time() - begin) / count * 1000

    def crop(position: int) -> None:
        image = images[position]
        box = random_crop_box(image.size, torch.Generator().manual_seed(position))
        crops.append(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))

    return {
        "read": timed(lambda position: samples.append(source[position % len(source)])),
        "decode": timed(lambda position: images.append(load_image(samples[position].image))),
        "crop and resize": timed(crop),
        "normalise": timed(lambda position: tensors.append(TRANSFORM._normalise(crops[position]))),
    }


def _shards(work: Path, count: int) -> Path:
    """Shards of pictures with the detail of photographs: smooth shapes and some noise, about 20 kB each."""
    folder = work / f"shards-{count}"
    if (folder / "manifest.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)

    def samples() -> Iterator[Sample]:
        for number in range(count):
            rng = np.random.default_rng(number)
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((LONGER, SHORTER), Image.Resampling.BICUBIC), dtype=np.float32)
            noise = rng.normal(0, 6, (SHORTER, LONGER, 1)).astype(np.float32)
            buffer = io.BytesIO()
            Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            yield Sample(f"{number:06d}", buffer.getvalue(), (f"picture {number}",), source="made")

    write_manifest(folder, "loader", {"train": write_split(folder, "train", samples())})
    return folder


if __name__ == "__main__":
    main()
