"""Atomic replacement of files, JSON, and locks."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from absl import logging

from experiments.runtime.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; its file then replaces `path` atomically. Errors name `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)  # otherwise a power cut may leave `path` empty
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        raise
    with contextlib.suppress(OSError):  # not all file systems can sync folders
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run.

    Raises:
      UserError: the file holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON; restore it from a backup") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object; restore it from a backup")
    return value


def lock(file: IO, wait: bool = False) -> bool:
    """Locks a file that is open for writing; False if another process has it and `wait` is not set.

    The system releases the lock when the file is closed, or the process is killed. On a file system
    without locks, this warns and returns True.

    Raises:
      OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        folder = os.path.dirname(file.name)
        logging.warning(
            "%s is on a file system without locks: make sure that no two processes use it", folder
        )
    return True
