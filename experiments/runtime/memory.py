"""How a process deals with memory that its computations free."""

import ctypes
import sys

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """Keeps freed memory for what is allocated next; call it before JAX starts its threads.

    Every update on a CPU frees what the one before it kept of its steps, hundreds of megabytes. By
    default glibc returns such memory to the system, which fills every page with zeros before it
    hands it out again. Without glibc, nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # of another C library
        return
    mallopt(_ARENA_MAX, 1)  # others than the main one cannot grow that large
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
