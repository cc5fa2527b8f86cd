"""What a run tells while it goes: a progress bar, a plain file of metrics, and on boards."""

import collections
import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from experiments.records.boards import Board
from experiments.runtime import markdown
from experiments.runtime.files import write_text
from experiments.runtime.progress import SECONDS_AVERAGED, SECONDS_LOGGED, rest_of_line, time_left

FILE_NAME = "metrics.jsonl"
SECONDS_SHOWN = 0.5  # between movements of the progress bar
# What normalised, as it is written in files, and as it is named wherever people read a number.
STATISTICS = {
    "batch": "batch statistics",
    "running": "population statistics, running average",
    "population": "population statistics, re-estimated",
    "population_batch_inputs": "population statistics, input terms by the batch",
    "none": "no batch statistics",
}


class Terminal(Console):
    """Where a run speaks. Whether anybody hears it any more, is nothing to the run."""

    def on_broken_pipe(self) -> None:
        """Is silent from then on; rich would end the process."""
        self.quiet = True


class UpdatesPerSecond(ProgressColumn):
    """Speed, in updates per second."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f} updates/s" if speed else "- updates/s")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics file, oldest first.

    A damaged line, as a power cut may leave one, is left out with a warning.
    """
    path = workdir / FILE_NAME
    if not path.exists():
        return []
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and {"update", "split"} <= row.keys():
                rows.append(row)
            elif line.endswith("\n"):  # else it is being written
                logging.warning("%s, line %d is damaged and left out", path, number)
    return rows


def describe(row: dict[str, Any]) -> str:
    """What was evaluated and how: `test (population statistics, re-estimated, one sequence)`."""
    reading = f", {row['reading']}" if "reading" in row else ""
    return f"{row['split']} ({STATISTICS[row['statistics']]}{reading})"


class Reporter:
    """Shows and writes the metrics of a run that goes on from update `start`.

    `data` is the name of the data, shown beside every number. Rows that a stopped run has written
    past `start` are dropped, to be written again.
    """

    def __init__(
        self,
        workdir: Path,
        title: str,
        data: str,
        start: int,
        num_updates: int,
        boards: Sequence[Board] = (),
    ) -> None:
        """Opens the metrics file in `workdir`; `boards` get every number too."""
        self._data = data
        self._boards = boards
        rows = [row for row in read_metrics(workdir) if row["update"] <= start]
        path = workdir / FILE_NAME
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")
        self.console = Terminal(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._progress = Progress(
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            UpdatesPerSecond(),
            rest_of_line("{task.fields[metrics]}  {task.description}"),
            expand=True,
            console=self.console,
            speed_estimate_period=SECONDS_AVERAGED,
            # A log file gets lines, not a bar for each of them.
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task(
            title, total=num_updates, completed=start, metrics="compiling"
        )
        self._shown = self._logged = time.monotonic()
        self._progress.start()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        self._file.close()

    def due(self) -> bool:
        """Whether it is time to move the progress bar."""
        return time.monotonic() - self._shown > SECONDS_SHOWN

    def advance(self, update: int) -> None:
        """Moves the progress bar to an update."""
        self._progress.update(self._bar, completed=update)
        self._shown = time.monotonic()

    def write(
        self, row: dict[str, Any], metrics: dict[str, float], more: dict[str, float] | None = None
    ) -> None:
        """Adds metrics to the metrics file and to the boards, and shows them.

        Args:
          row: what they are of: `update`, `split`, `statistics`, `reading` if that has a name.
          metrics: by name; a run that was stopped and goes on has the same.
          more: what is for the boards alone.
        """
        self._file.write(json.dumps(row | metrics) + "\n")
        self._file.flush()
        update, split = row["update"], row["split"]
        scalars = {f"{split}/{name}": v for name, v in {**metrics, **(more or {})}.items()}
        for board in self._boards:
            board.write(scalars, update)
        line = f"update {update:>6}  {self._data} {describe(row)}  {format_metrics(metrics)}"
        if split != "train":
            self._flush_boards()
            self.console.print(line)
            return
        self._progress.update(self._bar, completed=update, metrics=format_metrics(metrics))
        if not self.console.is_terminal and time.monotonic() - self._logged > SECONDS_LOGGED:
            (bar,) = self._progress.tasks
            self.console.print(f"{line}  {time_left(bar.time_remaining)}")
            self._logged = time.monotonic()

    def sync(self) -> None:
        """Has the metrics on the disk, before a checkpoint that rests on them."""
        os.fsync(self._file.fileno())
        self._flush_boards()

    def _flush_boards(self) -> None:
        for board in self._boards:
            board.flush()


class Silence:
    """What the other processes have for a `Reporter`: the first one speaks for all."""

    def __init__(self, *_: Any) -> None:
        self.console = Console(quiet=True)

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def due(self) -> bool:
        """Never."""
        return False

    def advance(self, update: int) -> None:
        """Says nothing."""

    def write(self, *_: Any) -> None:
        """Says nothing."""

    def sync(self) -> None:
        """Does nothing."""


class Stopwatch:
    """Where the host's time goes: seconds by name of what it does."""

    def __init__(self) -> None:
        """Starts with nothing done."""
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._lap = 0, 0.0  # updates and seconds when the speed was last taken

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time that its block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def updates_per_second(self, updates: int) -> float | None:
        """Speed since it was last taken, compilation aside; None if there was nothing else.

        `updates` are all so far but those for which a program was compiled.
        """
        seconds = sum(self.seconds.values()) - self.seconds.get("compilation", 0)
        (updates_before, seconds_before), self._lap = self._lap, (updates, seconds)
        if updates == updates_before:
            return None
        return (updates - updates_before) / (seconds - seconds_before)

    def table(self, updates: int) -> str:
        """Time per update, in all and by what it went to."""
        total = sum(self.seconds.values())
        parts = [*self.seconds.items(), ("in all", total)]
        rows = [
            (name, f"{1e3 * seconds / updates:.3f}", f"{seconds / total:.2%}")
            for name, seconds in parts
        ]
        return markdown.table([f"mean of {updates} updates", "ms", "share"], rows)


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics as people read them: `loss 0.512  accuracy 0.840`."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
