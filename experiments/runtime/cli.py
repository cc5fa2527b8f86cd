"""Runs commands: flags, `--help`, and user errors in one line."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags

from experiments import end_at_once
from experiments.runtime.errors import Stopped, UserError, report, tell

PACKAGES = ("experiments", "scripts")


class HelpFlag(flags.BooleanFlag):
    """`--help`: the docstring of the command, and the flags that this repository defines for it."""

    def __init__(self) -> None:
        super().__init__("help", False, "Show this help.", short_name="h")

    def parse(self, argument: Any) -> None:
        """Prints the help and ends the program if the flag is set."""
        super().parse(argument)
        if self.value:
            print(help_text())
            sys.exit()


def help_text() -> str:
    """The text of `--help`."""
    modules = flags.FLAGS.flags_by_module_dict()
    others = sorted(name for name in modules if name.split(".")[0] in PACKAGES)
    others.remove(__name__)
    listed = [flags.FLAGS.module_help(name) for name in (sys.argv[0], *others) if name in modules]
    return "\n".join([(sys.modules["__main__"].__doc__ or "").rstrip(), *listed])


def flags_alone(argv: Sequence[str]) -> list[str]:
    """Parses a command line of flags alone.

    Raises:
      UserError: there is another argument.
    """
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: write flags as --NAME=VALUE; see --help")
    return rest


def run(
    main: Callable[[list[str]], Any],
    define_flags: Callable[[], None] | None = None,
    parse: Callable[[Sequence[str]], Any] = flags_alone,
) -> NoReturn:
    """Runs a command: absl's `app.run`, with user errors in one line.

    A `UserError`, a flag that cannot be parsed, or a file that cannot be read or written becomes
    one line `error: ...` on stderr and exit status 2. A stopped run prints how to continue. A
    closed output, as by `head`, ends the command silently. Any other exception keeps its traceback.
    Warnings are logged; `--verbosity` logs more.

    Args:
      main: called with what `parse` returns.
      define_flags: defines the flags of the command, so that importing its module defines none.
      parse: called with the command line; parses `flags.FLAGS`. The default takes flags alone.
    """

    def parse_flags(argv: Sequence[str]) -> Any:
        delattr(flags.FLAGS, "help")  # absl's, which omits flags of other modules
        flags.DEFINE_flag(HelpFlag())
        if define_flags is not None:
            define_flags()
        return parse([argv[0], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)])

    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # an encoding may lack a character
        stream.reconfigure(errors="replace")
    words = list(sys.argv)
    if not any(word.lstrip("-").startswith(("verbosity", "v=")) for word in words):
        words.insert(1, "--verbosity=-1")  # warnings; else Orbax logs every save
    app.run(_reported(main), argv=words, flags_parser=_reported(parse_flags))


def _from_backend(error: BaseException) -> bool:
    """Whether JAX raised an error while it looked for devices."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).name == "xla_bridge.py"


def _reported(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(arguments: Any) -> Any:
        try:
            return function(arguments)
        except (UserError, flags.Error) as error:
            sys.exit(report(error))
        except Stopped as stopped:
            tell(str(stopped))
            sys.exit(stopped.status)
        except KeyboardInterrupt:
            end_at_once()  # an ordinary exit in the middle of a computation may crash JAX
        except (AssertionError, RuntimeError) as error:
            platforms = os.environ.get("JAX_PLATFORMS")
            if not platforms or not _from_backend(error):
                raise
            tell(
                f"error: JAX_PLATFORMS={platforms}: JAX finds no such device; unset it, or install "
                "JAX for the device"
            )
            sys.exit(2)
        except BrokenPipeError:  # the reader of stdout, such as head, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for later output
            sys.exit(141)
        except OSError as error:
            sys.exit(report(error))

    return call
