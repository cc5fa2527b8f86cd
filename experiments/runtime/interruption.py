"""SIGTERM, SIGHUP and Ctrl-C: a run finishes the current update, saves it and ends."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from types import FrameType

import jax

from experiments.jax_experimental import multihost_utils
from experiments.runtime.errors import Stopped, report
from experiments.runtime.processes import RunFailed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: a terminal was closed
# Numbers of JAX's synchronisation points. All processes stop at the same one.
_LOOKS = itertools.count(1)


class Interruption:
    """Requests to stop, which arrive as signals.

    Within its context, `requested` returns the first signal; a later Ctrl-C ends the process at
    once.

    In a job of several processes a SIGTERM to one of them reaches all, and all stop after the same
    update, or in the same call of `check`. All processes must make the same calls.
    """

    def __init__(self, more: bool = False) -> None:
        """No signal has been received yet.

        If `more` runs follow the context, its end raises `Stopped` after a signal, even if this run
        failed, which it reports.
        """
        self._more = more
        self._received: int | None = None
        self._agreed: int | None = None  # between several processes
        self._earlier = {}

    def __enter__(self) -> "Interruption":
        """Installs the handlers."""
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets no other thread handle signals
        for number in SIGNALS:
            earlier = signal.getsignal(number)
            # An ignored signal, such as Ctrl-C under nohup or in the background, stays ignored.
            # With several processes, JAX handles SIGTERM and informs all of them.
            if earlier != signal.SIG_IGN and not (
                jax.process_count() > 1 and number == signal.SIGTERM
            ):
                self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        """Restores the earlier handlers."""
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)
        if not self._more or not (error is None or isinstance(error, RunFailed)):
            return
        if (number := self.requested()) is not None:
            if error is not None:
                report(error)
            raise _stopped(number)

    def requested(self) -> int | None:
        """The signal that asks to stop now, the same on every process; None if there was none."""
        if jax.process_count() == 1:
            return self._received
        # JAX returns True once.
        if self._agreed is None and multihost_utils.reached_preemption_sync_point(next(_LOOKS)):
            self._agreed = signal.SIGTERM
        return self._agreed

    def check(self) -> None:
        """Stops if a signal asked for it; call it between pieces of work that can be repeated.

        Raises:
          Stopped: on every process.
        """
        if (number := self.requested()) is not None:
            raise _stopped(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = number
        for each in self._earlier:  # a cluster may send SIGTERM to a job more than once
            signal.signal(each, signal.SIG_DFL if each == signal.SIGINT else signal.SIG_IGN)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        # Shows the cursor again, which a progress bar hides.
        show = "\033[?25h" if sys.stderr.isatty() else ""
        said = f"{show}{_name(number)}: stopping after this update or batch{again}\n"
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended a pipe's reader
            os.write(sys.stderr.fileno(), said.encode())


def _stopped(number: int) -> Stopped:
    return Stopped(f"stopped by {_name(number)}; run the same command to continue", number)


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
