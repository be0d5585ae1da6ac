"""The order of samples: permutations, the same whatever the batch size, and shares as asked."""

import numpy as np
import pytest

from blip2.data.order import BLOCK, mixture_choice, mixture_draw, order, sample_index


@pytest.mark.parametrize("n", [1, 2, 97, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_epoch_is_a_permutation(n, epoch):
    assert sorted(order(7, epoch, n)) == list(range(n))


def test_epochs_and_seeds_differ():
    orders = [tuple(order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_positions_run_through_every_sample_once_an_epoch():
    seen = [sample_index(1, position, 13) for position in range(39)]
    assert all(sorted(seen[start : start + 13]) == list(range(13)) for start in (0, 13, 26))


def test_an_order_cannot_be_changed_by_its_reader():
    with pytest.raises(ValueError, match="read-only"):
        order(0, 0, 5)[0] = 1


def test_the_order_is_the_same_in_every_version():
    """Known values: a change would end exact resume of runs under way."""
    assert order(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert [mixture_choice(0, position, [2, 1]).source for position in range(9)] == [0, 0, 0, 1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("weights", [[1], [2, 1], [1, 1, 1], [0.7, 0.2, 0.1], [5, 0.02]])
def test_each_block_holds_the_exact_shares(weights):
    places = [mixture_choice(3, position, weights) for position in range(2 * BLOCK)]
    for block in (places[:BLOCK], places[BLOCK:]):
        counts = np.bincount([place.source for place in block], minlength=len(weights))
        assert counts.sum() == BLOCK
        assert np.abs(counts - BLOCK * np.asarray(weights) / sum(weights)).max() < 1


def test_each_source_runs_through_its_own_positions_in_turn():
    places = [mixture_choice(3, position, [0.7, 0.2, 0.1]) for position in range(2500)]
    for source in range(3):
        own = [place.position for place in places if place.source == source]
        assert own == list(range(len(own)))


def test_no_sample_of_a_mixture_returns_before_its_source_is_gone_through():
    sizes = (37, 11)
    draws = [mixture_draw(3, position, [2, 1], sizes) for position in range(600)]
    for source, size in enumerate(sizes):
        own = [draw for draw in draws if draw.source == source]
        for epoch in range(len(own) // size):
            indices = [draw.index for draw in own if draw.epoch == epoch]
            assert sorted(indices) == list(range(size))


def test_sources_of_one_size_are_not_in_step():
    draws = [mixture_draw(3, position, [1, 1], (50, 50)) for position in range(100)]
    first, second = ([draw.index for draw in draws if draw.source == source] for source in (0, 1))
    assert first != second


def test_a_position_needs_no_position_before_it():
    """Resume asks for position 5,000 first; an uninterrupted run comes to it last."""
    late = mixture_draw(9, 5000, [2, 1], (37, 11))
    order.cache_clear()
    for position in range(5000):
        mixture_draw(9, position, [2, 1], (37, 11))
    assert mixture_draw(9, 5000, [2, 1], (37, 11)) == late
