"""Keeps freed memory in the process, for later computations."""

import ctypes
import sys

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """Keeps freed memory for later allocations; call it before JAX starts its threads.

    Every update on a CPU frees the residuals of its steps, hundreds of megabytes. By default glibc
    returns such memory to the system, which zeroes every page before it is used again. Does nothing
    without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(_ARENA_MAX, 1)  # other arenas than the main one cannot grow that large
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
