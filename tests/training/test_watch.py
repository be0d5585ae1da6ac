"""Who is to blame when a run of several processes stands still."""

import pytest

from blip2.training.watch import COMPUTING, READING, Whereabouts, accusation

NOW = 1000.0


def place(rank: int, step: int, doing: str, since: float, at: float = NOW) -> Whereabouts:
    return Whereabouts(rank, f"node-{rank // 2}", 100 + rank, step, doing, since, at)


@pytest.mark.parametrize(
    ("heard", "said"),
    [
        (
            [place(0, 7, COMPUTING, 940), place(1, 7, READING, 939)],
            "Rank 1 (host node-0, process 101) has been reading",
        ),
        ([place(0, 7, COMPUTING, 940), place(1, 6, COMPUTING, 939)], "Rank 1 (host node-0, process 101) has been comp"),
        (
            [place(0, 7, COMPUTING, 940), place(1, 7, COMPUTING, 939, at=950)],
            "Rank 1 (host node-0, process 101) has not",
        ),
        (
            [place(0, 7, READING, 900), place(1, 7, COMPUTING, 939), place(2, 7, COMPUTING, 941)],
            "rank 1, 2 waits for it",
        ),
    ],
    ids=["reads", "is behind", "is silent", "others"],
)
def test_the_rank_that_the_others_wait_for_is_named(heard, said):
    assert said in accusation(heard, own=0)
