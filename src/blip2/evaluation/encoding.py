"""Pictures through the frozen image encoder, once each, their features kept in memory while they are needed."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from blip2.data.sample import Sample
from blip2.inference.blip2 import Blip2

PICTURES_AT_ONCE = {"cpu": 8, "cuda": 64}  # on a CPU eight stay in its cache, which is twice as fast as 64
Say = Callable[[str], None]


class Progress:
    """Tells how far a piece of work has come, every ten seconds and at its end.

    Args:
        say: told a line at a time.
        what: the work, in words.
        total: how many pieces it has.
    """

    def __init__(self, say: Say, what: str, total: int) -> None:
        self._say, self._what, self._total = say, what, total
        self._begin = self._last = time.perf_counter()
        self._done = 0

    def add(self, count: int) -> None:
        """So many more pieces are done."""
        self._done += count
        now = time.perf_counter()
        if now - self._last > 10 or self._done == self._total:
            self._last = now
            self._say(f"{self._what}: {self._done:,} of {self._total:,}, {now - self._begin:.0f} s")


def encode(model: Blip2, samples: Sequence[Sample], what: str, say: Say) -> Tensor:
    """Image features (P, N, Dv) of the samples' pictures, in memory as float16, as most caches of training are."""
    features = torch.empty(0, dtype=torch.float16)
    for rows, encoded in _encoded(model, samples, what, say):
        if not len(features):
            features = torch.empty(len(samples), *encoded.shape[1:], dtype=torch.float16)
        features[rows] = encoded.to(device="cpu", dtype=torch.float16)
    return features


def encode_pooled(model: Blip2, samples: Sequence[Sample], what: str, say: Say) -> np.ndarray:
    """Pooled features (P, 2 Dv) of the samples' pictures: the mean over the tokens, then the maximum."""
    pooled = np.empty((len(samples), 2 * model.vision_model.width))  # made at once: pieces would tear the heap apart
    for rows, encoded in _encoded(model, samples, what, say):
        pooled[rows] = pool(encoded)
    return pooled


def pool(features: Tensor) -> np.ndarray:
    """Mean and maximum over the tokens: (P, N, Dv) -> (P, 2 Dv), double precision."""
    pooled = [_pool(some.float()) for some in features.split(64)]  # in pieces, since they are widened to float32
    return torch.cat(pooled).double().cpu().numpy()


def _pool(features: Tensor) -> Tensor:
    return torch.cat([features.mean(dim=1), features.amax(dim=1)], dim=1)


def _encoded(model: Blip2, samples: Sequence[Sample], what: str, say: Say) -> Iterator[tuple[slice, Tensor]]:
    """Which samples, and their features (B, N, Dv)."""
    progress = Progress(say, f"image features of {what}", len(samples))
    size = PICTURES_AT_ONCE[next(model.vision_model.parameters()).device.type]
    for first in range(0, len(samples), size):
        rows = slice(first, min(first + size, len(samples)))
        yield rows, model.image_features([sample.image for sample in samples[rows]])
        progress.add(rows.stop - rows.start)
