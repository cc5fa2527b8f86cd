"""Errors that the user can correct, and their reports."""

import contextlib
import difflib
import sys
import traceback
from collections.abc import Iterable

from absl import flags


class UserError(Exception):
    """A mistake the user can correct; its message is one line that says what to do."""


def report(error: Exception) -> int:
    """Prints an error on stderr; returns the exit status.

    A `UserError`, a wrong flag, or a file that cannot be read or written gives one line and status
    2. Any other error gives a traceback and status 1.
    """
    if isinstance(error, UserError | flags.Error):
        line = " ".join(str(error).split())
    elif isinstance(error, OSError) and error.filename is not None:
        line = f"{error.filename}: {error.strerror}"
    else:
        traceback.print_exception(error)
        return 1
    tell(f"error: {line}")
    return 2


def tell(line: str) -> None:
    """Prints a line on stderr; does nothing if the terminal is closed."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Stopped(BaseException):
    """A signal asked the run to stop; the message says how to continue.

    Like KeyboardInterrupt, it is not an `Exception`, so that libraries do not catch it.

    Attributes:
      status: exit status, the one that a shell reports for a process ended by the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.status = 128 + signal


def unknown_name(field: str, name: str, known: Iterable[str]) -> str:
    """The error message for an unknown name, with the nearest known name."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    choice = f": use one of {', '.join(x or repr(x) for x in known)}" if known else ""
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{field} is {name!r}, which is unknown{choice}{hint}"
