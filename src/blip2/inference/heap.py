"""Memory that was freed, given back to the system.

Between large tensors that come and go, small ones that stay keep glibc's heap from shrinking: after some thousand
pictures more than a gigabyte is holes, where the model is one. `malloc_trim` lets the pages of the holes go, in some 30
ms for that gigabyte; other C libraries do it by themselves, or not.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

PICTURES = 100  # after so many it is time again: half a percent of what they take


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None


def give_back() -> None:
    """Lets the unused pages of the heap go, where that can be asked for."""
    if (trim := _malloc_trim()) is not None:
        trim(0)
