"""Batches one ahead: the next is read while the current one is computed with."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def prefetched(batches: Callable[[int], Any], first: int, end: int) -> Iterator[Iterator[Any]]:
    """The batches first ... end - 1, each made in a thread while its predecessor is in use."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        pending: list[Future] = [pool.submit(batches, first)] if first < end else []

        def ahead() -> Iterator[Any]:
            for index in range(first, end):
                batch = pending.pop().result()
                if index + 1 < end:
                    pending.append(pool.submit(batches, index + 1))
                yield batch

        yield ahead()
