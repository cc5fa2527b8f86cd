"""Progress bars, or lines in a log file."""

import contextlib
import datetime
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from experiments.runtime import processes

SECONDS_AVERAGED = 300  # for the time left; updates may complete in bursts
SECONDS_LOGGED = 60  # between lines in a log file
T = TypeVar("T")


class Output:
    """A stream that drops text, without an error, once it cannot be written any more."""

    def __init__(self, stream: TextIO) -> None:
        """Wraps a stream."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """The stream's attributes, such as `isatty`."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text, or drops it."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with open(os.devnull, "w") as nowhere:  # also for the stream's buffer
                os.dup2(nowhere.fileno(), self._stream.fileno())


def rest_of_line(text: str) -> TextColumn:
    """A column that takes the space that the others leave; longer text is cut off."""
    return TextColumn(text, markup=False, table_column=Column(ratio=1, no_wrap=True))


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yields the items and shows a transient progress bar; in a log file, a line a minute.

    Shows nothing if `total` is 0, which means unknown.
    """
    # Outside a job, this does not look for devices: on one worker of a TPU pod, JAX would wait for
    # the others.
    first = not jax.distributed.is_initialized() or processes.is_first()
    if not first or not total:
        yield from items
        return
    console = Console()
    if console.is_terminal:
        columns = (
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            rest_of_line("{task.description}"),
        )
        with Progress(*columns, console=console, expand=True, transient=True) as progress:
            yield from progress.track(items, total, description=title)
        return
    start = logged = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - logged > SECONDS_LOGGED:
            left = time_left((now - start) / done * (total - done))
            print(f"{title}: {done:,} of {total:,}, {left}", flush=True)
            logged = now


def time_left(seconds: float | None) -> str:
    """A time in words: `0:12:30 left`."""
    return f"{datetime.timedelta(seconds=round(seconds)) if seconds is not None else '?'} left"
