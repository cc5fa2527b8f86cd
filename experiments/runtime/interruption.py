"""SIGTERM and Ctrl-C: a run ends after the update at hand, and saves it."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from types import FrameType

import jax

from bnlstm_jax.jax_experimental import multihost_utils
from experiments.runtime.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# JAX has all processes stop at the same one of these, so that none may be left out.
_LOOKS = itertools.count(1)


class Interruption:
    """What signals ask for, between updates and elsewhere.

    To be used as a context, in which the first signal is a request that `requested` tells of; a
    Ctrl-C after it ends the process at once. After `wait_no_more`, a signal raises `Stopped`.

    In a job of several processes all hear of a SIGTERM to one of them, and stop after the same
    update, or in the same call of `check`. All have to make the same calls.
    """

    def __init__(self) -> None:
        """Nothing has been asked for yet."""
        self._received: int | None = None
        self._waiting = True
        self._earlier = {}

    def __enter__(self) -> "Interruption":
        """Takes over the signals' handling."""
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets no other handle signals
        for number in SIGNALS:
            earlier = signal.getsignal(number)
            # One that is ignored, as Ctrl-C is under nohup or in the background, stays so. Several
            # processes leave SIGTERM to JAX, which tells all of them.
            if earlier != signal.SIG_IGN and not (
                jax.process_count() > 1 and number == signal.SIGTERM
            ):
                self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)

    def wait_no_more(self) -> None:
        """Has signals stop what is going on, all of which can be done again.

        Raises:
          Stopped: one has come since `requested` told of none.
        """
        self._waiting = False
        self.check()

    def requested(self) -> int | None:
        """The signal that asks to stop now, on every process; None if there was none."""
        if jax.process_count() > 1:
            reached = multihost_utils.reached_preemption_sync_point(next(_LOOKS))
            return signal.SIGTERM if reached else None
        return self._received

    def check(self) -> None:
        """Stops if that was asked for; to be called between batches, after `wait_no_more`.

        Raises:
          Stopped: on every process.
        """
        if (number := self.requested()) is not None:
            raise Stopped(f"stopped by {_name(number)}; the same command goes on", number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = number
        if not self._waiting and jax.process_count() == 1:
            self.check()
        for each in self._earlier:  # a cluster may send SIGTERM to a job by several ways
            signal.signal(each, signal.SIG_DFL if each == signal.SIGINT else signal.SIG_IGN)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
        again = "; once more to stop at once" if number == signal.SIGINT else ""
        # The cursor, which a progress bar hides, is shown again: nobody else could.
        show = "\033[?25h" if sys.stderr.isatty() else ""
        said = f"{show}{_name(number)}: stopping after this update{again}\n"
        with contextlib.suppress(OSError):  # who read it may have got the same Ctrl-C
            os.write(sys.stderr.fileno(), said.encode())


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
