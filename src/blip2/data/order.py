"""The global order of samples, as a pure function of the seed and the position.

Position p of a run is sample `order(seed, p // n, n)[p % n]`: each epoch is a permutation of its own, and neither the
batch size nor a restart changes what stands at a position, so resuming needs nothing but the step. With several
sources a position is first dealt to a source, in blocks of BLOCK that each hold the exact shares, and every source
runs through its own permutations:

    position     0    1    2    3    4    5    6   ...
    source       A    B    A    A    B    A    A   ...      mixture_draw(seed, position, weights, sizes)
    A's own      0         1    2         3    4   ...      -> order(seed of A, epoch, size of A)
    B's own           0              1             ...      -> order(seed of B, epoch, size of B)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK = 1000  # shares are exact to 1/1,000 within a block, and so over a run


@dataclass(frozen=True)
class Place:
    """Where a position of the run falls: the source, and the source's own position."""

    source: int
    position: int


@dataclass(frozen=True)
class Draw:
    """The sample at a position of the run: its source, its index there, and how often that source was gone through."""

    source: int
    index: int
    epoch: int


@lru_cache(maxsize=64)
def order(seed: int | tuple[int, ...], epoch: int, n: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0..n-1, read-only.

    Sorting raw Philox numbers and not `permutation()`: NumPy promises that the raw stream stays the same in later
    versions, but promises nothing for its shuffles.
    """
    entropy = [*_as_tuple(seed), epoch]
    drawn = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
    permutation = np.argsort(drawn, kind="stable")  # (n,)
    permutation.setflags(write=False)
    return permutation


def sample_index(seed: int | tuple[int, ...], position: int, n: int) -> int:
    """Index of the sample at a position of the run, which goes through n samples epoch by epoch."""
    epoch, offset = divmod(position, n)
    return int(order(seed, epoch, n)[offset])


def mixture_choice(seed: int, position: int, weights: Sequence[float]) -> Place:
    """The source whose turn it is at a position of the run, and that source's own position.

    Args:
        seed: of the run.
        position: of the sample in the run.
        weights: share of each source, in any scale; each at least 1 in BLOCK.
    """
    quotas = _quotas(tuple(weights))
    block, offset = divmod(position, BLOCK)
    dealt, rank = _block(seed, block, quotas)
    source = int(dealt[offset])
    return Place(source=source, position=block * quotas[source] + int(rank[offset]))


def mixture_draw(seed: int, position: int, weights: Sequence[float], sizes: Sequence[int]) -> Draw:
    """The sample at a position of a run that mixes sources.

    Args:
        seed: of the run.
        position: of the sample in the run.
        weights: share of each source.
        sizes: number of samples of each source.
    """
    place = mixture_choice(seed, position, weights)
    size = sizes[place.source]
    index = sample_index((seed, place.source), place.position, size)
    return Draw(source=place.source, index=index, epoch=place.position // size)


@lru_cache(maxsize=16)
def _quotas(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Places of each source in a block, by largest remainder."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK  # (sources,)
    quotas = np.floor(shares).astype(int)
    missing = BLOCK - int(quotas.sum())
    quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
    assert (quotas > 0).all(), f"weights {weights}: each needs a share of at least 1/{BLOCK}"
    return tuple(int(quota) for quota in quotas)


@lru_cache(maxsize=64)
def _block(seed: int, block: int, quotas: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The source at each place of a block, and how many places of that source come before it there."""
    # The third number keeps these draws apart from those of `order`, which has two or three smaller ones.
    shuffled = order((seed, 2**32 - 1), block, BLOCK)
    dealt = np.repeat(np.arange(len(quotas)), quotas)[shuffled]  # (BLOCK,)
    rank = np.zeros(BLOCK, dtype=int)
    for source, quota in enumerate(quotas):
        rank[dealt == source] = np.arange(quota)
    return dealt, rank


def _as_tuple(seed: int | tuple[int, ...]) -> tuple[int, ...]:
    return seed if isinstance(seed, tuple) else (seed,)
