"""SIGTERM and Ctrl-C: a run ends after the update at hand, and saves it."""

import signal
import sys
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from experiments.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """What signals ask for, between updates and elsewhere.

    To be used as a context, in which the first signal is a request that `requested` tells of; a
    Ctrl-C after it ends the process at once. After `wait_no_more`, a signal raises `Stopped`.

    In a job of several processes all hear of a SIGTERM to one of them, and stop after the same
    update.
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
        """Has signals stop what is going on, all of which can be done again."""
        self._waiting = False

    def requested(self, update: int) -> int | None:
        """The signal that asks to stop after `update`, on every process; None if there was none."""
        if jax.process_count() > 1:
            reached = multihost_utils.reached_preemption_sync_point(update)
            return signal.SIGTERM if reached else None
        return self._received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if not self._waiting:
            raise Stopped(f"stopped by {name}; the same command goes on", number)
        self._received = number
        for each in self._earlier:  # a cluster may send SIGTERM to a job by several ways
            signal.signal(each, signal.SIG_DFL if each == signal.SIGINT else signal.SIG_IGN)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
        again = "; once more to stop at once" if number == signal.SIGINT else ""
        # The cursor, which a progress bar hides, is shown again: nobody else could.
        show = "\033[?25h" if sys.stderr.isatty() else ""
        print(f"{show}{name}: stopping after this update{again}", file=sys.stderr, flush=True)
