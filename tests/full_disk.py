"""A disk that fills up, or as good as."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk, files cannot grow beyond a size: a stand-in that needs no rights."""
    earlier = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, earlier)
