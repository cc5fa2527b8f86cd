"""Mistakes that the user can correct."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend; its message is one line that says what to do.

    Attributes:
      status: exit status.
    """

    status = 2


class Stopped(BaseException):
    """A run was asked to stop by a signal; its message says how to go on.

    Like KeyboardInterrupt it is no Exception, which libraries on the way might take for their own.

    Attributes:
      status: exit status, as a shell gives it to a process that the signal ended.
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
