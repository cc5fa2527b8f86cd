"""Imitation of a full disk."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def files_of_at_most(size):
    """Files cannot grow beyond a size, as on a full disk. This needs no privileges."""
    earlier = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, earlier)
