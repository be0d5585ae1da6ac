"""What the C library does with freed memory, which decides half the speed of training on a CPU."""

import ctypes


def keep_freed_memory() -> None:
    """Have the C library keep the memory a step frees for the next one, instead of returning it page by page.

    Half of a CPU step went into fresh pages before (glibc only; elsewhere this does nothing).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    for parameter, value in ((mmap_threshold, 2**31 - 1), (trim_threshold, 2**31 - 1), (top_pad, 2**27)):
        mallopt(parameter, value)
