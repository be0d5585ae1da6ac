"""What ranks tell each other: rows arrive in order, and their gradients find the way back."""

import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from blip2 import distributed
from blip2.errors import UserError

RANKS, ROWS, WIDTH = 3, 4, 5


def table() -> torch.Tensor:
    """The rows of the world, (W, WIDTH)."""
    return torch.arange(RANKS * ROWS * WIDTH, dtype=torch.float64).reshape(-1, WIDTH).sin()


def own(rows: torch.Tensor) -> torch.Tensor:
    """This rank's part of the world's rows, to be differentiated."""
    share = len(rows) // distributed.world_size()
    first = distributed.rank() * share
    return rows[first : first + share].clone().requires_grad_(True)


def gathering() -> tuple[torch.Tensor, torch.Tensor]:
    rows = own(table())
    everyone = distributed.gather_with_gradient(rows)
    weight = 1.0 + distributed.rank()  # each rank asks something else of the rows
    (everyone.square() * weight).sum().backward()
    return everyone.detach(), rows.grad


def test_gathered_rows_are_the_worlds_and_gradients_of_all_ranks_come_back():
    everyone, gradients = zip(*on_ranks(RANKS, gathering), strict=True)
    for found in everyone:
        assert torch.equal(found, table())
    torch.testing.assert_close(torch.cat(gradients), 2 * table() * sum(range(1, RANKS + 1)))


def fetching(wanted: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = own(table())
    mine = torch.tensor(wanted[distributed.rank()], dtype=torch.long)
    fetched = distributed.fetch_rows(rows, mine)
    (fetched * (1.0 + distributed.rank())).sum().backward()
    return fetched.detach(), rows.grad


WANTED = {
    "of all": [[11, 0, 5, 5], [3, 2, 1, 0], [4, 8, 0, 11]],
    "own only": [[0, 1], [4, 5], [8, 9]],
    "of one rank": [[4, 4, 4], [4, 5, 6], [7, 4, 7]],
    "unequal numbers": [[11], [0, 1, 2, 3, 4, 5], []],
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_fetched_rows_are_those_asked_for_and_their_gradients_travel_back(wanted):
    fetched, gradients = zip(*on_ranks(RANKS, fetching, wanted), strict=True)
    expected = torch.zeros(RANKS * ROWS, WIDTH, dtype=torch.float64)
    for rank, rows in enumerate(wanted):
        assert torch.equal(fetched[rank], table()[rows])
        expected.index_add_(
            0, torch.tensor(rows, dtype=torch.long), torch.full((len(rows), WIDTH), 1.0 + rank).double()
        )
    assert torch.equal(torch.cat(gradients), expected)


def padding() -> torch.Tensor:
    rank = distributed.rank()
    return distributed.gather_padded(torch.full((2, rank + 1), rank + 1), fill=0)


def test_token_rows_of_unequal_length_are_filled_up():
    for found in on_ranks(RANKS, padding):
        assert found.tolist() == [[1, 0, 0]] * 2 + [[2, 2, 0]] * 2 + [[3, 3, 3]] * 2


def telling() -> tuple[float, str, bool]:
    mean = distributed.share_of(torch.tensor(distributed.rank() + 1))
    return float(mean), distributed.said_by_first(f"rank {distributed.rank()}"), distributed.is_first()


def test_counts_are_shared_and_the_first_rank_has_the_say():
    assert on_ranks(RANKS, telling) == [(2.0, "rank 0", rank == 0) for rank in range(RANKS)]


def failing() -> None:
    if distributed.rank() == 1:
        raise ValueError("the second rank is lost")
    distributed.wait_for_all()


def test_a_rank_that_fails_is_not_waited_for():
    with pytest.raises(Exception, match=r"second rank is lost|[Cc]onnection|terminated"):
        on_ranks(2, failing)


def test_alone_everything_is_ones_own():
    rows = torch.arange(6.0).reshape(3, 2).requires_grad_(True)
    assert distributed.gather_with_gradient(rows) is rows
    assert torch.equal(distributed.fetch_rows(rows, torch.tensor([2, 0])), rows[[2, 0]])
    assert (distributed.rank(), distributed.world_size(), distributed.is_first()) == (0, 1, True)


@pytest.mark.parametrize("late", range(3))
def test_ranks_that_are_started_again_meet_each_other_and_not_the_dead(late):
    store = dist.HashStore()
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(RANKS) as pool:
            ranks = [pool.submit(_come, store, rank, 0.2 * (rank == late)) for rank in range(RANKS)]
            names.append({rank.result() for rank in ranks})
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == 3


def _come(store: dist.Store, rank: int, after: float) -> str:
    time.sleep(after)
    return distributed.meet(store, rank, RANKS)


def test_a_rank_that_died_before_it_met_the_others_holds_nobody_up():
    store = dist.HashStore()
    with pytest.raises(UserError):
        distributed.meet(store, 2, RANKS, datetime.timedelta(milliseconds=50))
    with ThreadPoolExecutor(RANKS) as pool:
        assert len(set(pool.map(lambda rank: distributed.meet(store, rank, RANKS), range(RANKS)))) == 1


def test_ranks_that_wait_in_vain_say_for_whom():
    soon = datetime.timedelta(milliseconds=50)
    with pytest.raises(UserError, match=r"Of the 3 ranks, \[1, 2\] did not come"):
        distributed.meet(dist.HashStore(), 0, RANKS, soon)
    with pytest.raises(UserError, match="Rank 2 waited for rank 0"):
        distributed.meet(dist.HashStore(), 2, RANKS, soon)
