"""Mistakes that the user can correct."""

import difflib
import sys
import traceback
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can correct; its message is one line that says what to do."""


def report(error: Exception) -> None:
    """Prints an error on stderr: a user's mistake in one line, any other with its traceback."""
    if isinstance(error, UserError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    else:
        traceback.print_exception(error)


class Stopped(BaseException):
    """A signal asked the run to stop; its message says how to go on.

    Like KeyboardInterrupt, not an Exception: libraries in between must not catch it.

    Attributes:
      status: exit status, the one that a shell reports for a process ended by the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.status = 128 + signal


def unknown_name(field: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among those known, with the nearest one that is."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{field} is {name!r}, which is unknown: {hint}there are {', '.join(known)}"
