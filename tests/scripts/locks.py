"""Locks of files, which say that a process is there."""

import fcntl
from pathlib import Path


def is_held(path: Path) -> bool:
    """Whether a process has locked a file; not if there is no such file."""
    if not path.exists():
        return False
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
