"""Samples whose texts are near each other, so that a batch can hold negatives that are hard to tell apart.

In a batch drawn at random the nearest wrong text of a black cat is some other animal; beside a white cat it has to be
told what "black" means. Grouped mini-batch sampling (GRIT-VLP, Byun et al., 2022) fills batches so, for contrast and
matching alike; here a sample may be followed by one of its nearest neighbours.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

NEAREST = 10  # neighbours that one is drawn from
_ROWS = 1024  # texts compared at once


class Neighbours:
    """The nearest other texts of each sample of a split.

    Args:
        names: S texts, one a sample; samples of equal name are no neighbours.
        distinct: the U different ones of them.
        embeds: (U, D), a unit vector of each of these.
        nearest: how many neighbours a text has.
    """

    def __init__(
        self, names: Sequence[str], distinct: Sequence[str], embeds: np.ndarray, nearest: int = NEAREST
    ) -> None:
        number_of = {name: number for number, name in enumerate(distinct)}
        self._number = [number_of[name] for name in names]  # S
        samples: dict[int, list[int]] = defaultdict(list)
        for index, number in enumerate(self._number):
            samples[number].append(index)
        self._samples = samples
        self._near = _nearest(embeds, min(nearest, len(distinct) - 1))  # (U, K)

    def draw(self, index: int, rng: np.random.Generator) -> int:
        """A sample with one of the texts nearest to that of sample `index`, by chance; itself where there is none."""
        near = self._near[self._number[index]]  # (K,)
        if not len(near):
            return index
        samples = self._samples[int(near[rng.integers(len(near))])]
        return samples[int(rng.integers(len(samples)))]


def _nearest(embeds: np.ndarray, k: int) -> np.ndarray:
    """(U, K) numbers of the k nearest others of each row, nearest first."""
    near = np.empty((len(embeds), k), dtype=np.int64)
    for first in range(0, len(embeds), _ROWS):
        rows = np.arange(first, min(first + _ROWS, len(embeds)))
        similarity = embeds[rows] @ embeds.T  # (R, U)
        similarity[rows - first, rows] = -np.inf
        some = np.argpartition(-similarity, k - 1, axis=1)[:, :k] if k else near[rows]  # (R, K), in no order
        order = np.argsort(-np.take_along_axis(similarity, some, axis=1), axis=1, kind="stable")
        near[rows] = np.take_along_axis(some, order, axis=1)
    return near
