"""Experiments: data, tasks, training and evaluation around the `bnlstm_jax` library."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def end_at_once(number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    """Ends the process on Ctrl-C, without raising an exception in a half-loaded module."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print("stopped", file=sys.stderr, flush=True)
    os._exit(130)


# Handles Ctrl-C while a command's modules load, which takes seconds. `cli.run` removes the handler.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
