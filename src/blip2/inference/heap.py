"""Memory that was freed, given back to the system.

Between large tensors that come and go, small ones that stay keep glibc's heap from shrinking: after some thousand
pictures more than a gigabyte is holes, where the model is one. `malloc_trim` lets the pages of the holes go, in some 30
ms for that gigabyte; other C libraries do it by themselves, or not.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from functools import cache

SHARE = 0.005  # of the time that work takes may go into it
LEAST_SECONDS = 0.03  # that it takes, pages that are asked for anew included


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None


class Holes:
    """Gives memory back now and then, so that it takes half a percent of the time: after a hundred pictures of a small
    model, or six that take a second each and leave more behind."""

    def __init__(self) -> None:
        self._worked = 0.0
        self._cost = LEAST_SECONDS

    def after(self, seconds: float) -> None:
        """Work was done for so long."""
        self._worked += seconds
        if self._worked * SHARE >= self._cost:
            begin = time.perf_counter()
            give_back()
            self._worked, self._cost = 0.0, max(LEAST_SECONDS, time.perf_counter() - begin)


def give_back() -> None:
    """Lets the unused pages of the heap go, where that can be asked for."""
    if (trim := _malloc_trim()) is not None:
        trim(0)
