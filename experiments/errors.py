"""Mistakes that the user can mend, and how the commands report them."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from absl import app, flags


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


def run(
    main: Callable[[list[str]], Any],
    flags_parser: Callable[[Sequence[str]], Any] = flags.FLAGS,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Runs a command: absl's `app.run`, with user errors reported plainly.

    A `UserError`, or a flag that cannot be parsed, becomes one line `error: ...` on stderr and exit
    status 2; a run that was stopped tells how to go on; an output that is closed, as by `head`,
    ends it quietly; any other exception keeps its traceback. Warnings are logged, and more on
    request by `--verbosity`. `-h` means `--help`, which absl alone does not know.

    Args:
        main: Called with what `flags_parser` returns.
        flags_parser: Called with the command line; parses `flags.FLAGS`.
        argv: The command line, program name first; `sys.argv` if None.
    """

    def reported(function: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], Any]:
        def call(arguments: Sequence[str]) -> Any:
            try:
                return function(arguments)
            except (UserError, flags.Error) as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                sys.exit(getattr(error, "status", 2))
            except Stopped as stopped:
                print(stopped, file=sys.stderr)
                sys.exit(stopped.status)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                sys.exit(130)
            except BrokenPipeError:  # the reader, such as head, has had enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left
                sys.exit(141)

        return call

    words = sys.argv if argv is None else argv
    words = ["--help" if word == "-h" else word for word in words]
    if not any(word.lstrip("-").startswith(("verbosity", "v=")) for word in words):
        words.insert(1, "--verbosity=-1")  # warnings; Orbax tells of every save otherwise
    app.run(reported(main), argv=words, flags_parser=reported(flags_parser))
