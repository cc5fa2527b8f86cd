"""Reports the metrics of a run while it trains: a progress bar, a metrics file, and boards."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

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
from experiments.runtime import processes
from experiments.runtime.files import write_text
from experiments.runtime.progress import (
    SECONDS_AVERAGED,
    SECONDS_LOGGED,
    rest_of_line,
    time_left,
)

FILE_NAME = "metrics.jsonl"
SECONDS_SHOWN = 0.5  # between movements of the progress bar
# The kinds of statistics that normalise: names in files, and in tables.
STATISTICS = {
    "batch": "batch statistics",
    "running": "population statistics, running average",
    "population": "population statistics, re-estimated",
    "population_batch_inputs": "population statistics, input terms by the batch",
    "none": "no batch statistics",
}
FINAL = ("population", "none")  # of final results


class UpdatesPerSecond(ProgressColumn):
    """Speed, in updates per second."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f} updates/s" if speed else "- updates/s")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics file, oldest first.

    A damaged line, such as after a power cut, is left out with a warning.
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
            elif line.endswith("\n"):  # else the run is still writing it
                logging.warning("%s, line %d is damaged and left out", path, number)
    return rows


def describe(row: dict[str, Any]) -> str:
    """What was evaluated and how: `test (population statistics, re-estimated, one sequence)`."""
    reading = f", {row['reading']}" if "reading" in row else ""
    return f"{row['split']} ({STATISTICS[row['statistics']]}{reading})"


class Reporter:
    """Shows and writes the metrics of a run that continues from update `start`.

    `data` is the name of the data, shown beside every number. Rows past `start`, which a stopped
    run has written, are dropped and written again. In processes other than the first it does
    nothing.
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
        self._file: TextIO | None = None
        if processes.is_first():
            rows = [row for row in read_metrics(workdir) if row["update"] <= start]
            path = workdir / FILE_NAME
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            self._file = path.open("a", encoding="utf-8")
        self._console = Console(
            highlight=False,
            soft_wrap=True,
            markup=False,
            emoji=False,
            quiet=self._file is None,
        )
        self._progress = Progress(
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            UpdatesPerSecond(),
            rest_of_line("{task.fields[metrics]}  {task.description}"),
            expand=True,
            console=self._console,
            speed_estimate_period=SECONDS_AVERAGED,
            # A log file gets lines in place of a bar.
            disable=self._console.quiet or not self._console.is_terminal,
        )
        self._bar = self._progress.add_task(
            title, total=num_updates, completed=start, metrics="compiling"
        )
        self._shown = self._logged = time.monotonic()
        self._timed: tuple[int, float] | None = None  # None until programs are compiled
        self._done = start
        self._progress.start()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()

    def print(self, *lines: str) -> None:
        """Shows lines."""
        for line in lines:
            self._console.print(line)

    def due(self) -> bool:
        """Whether it is time to move the progress bar."""
        return time.monotonic() - self._shown > SECONDS_SHOWN

    def advance(self, update: int) -> None:
        """Moves the progress bar to an update that has been computed."""
        self._done = update
        self._progress.update(self._bar, completed=update)
        self._shown = time.monotonic()

    def start_timing(self, update: int) -> None:
        """Times updates from here, for `speed`."""
        self._timed = update, time.monotonic()

    def speed(self) -> dict[str, float]:
        """`updates_per_second` since `start_timing`; nothing before its first call."""
        if self._timed is None:
            return {}
        update, start = self._timed
        return {"updates_per_second": (self._done - update) / (time.monotonic() - start)}

    def write(
        self, row: dict[str, Any], metrics: dict[str, float], more: dict[str, float] | None = None
    ) -> None:
        """Adds metrics to the metrics file and to the boards, and shows them.

        Args:
          row: `update`, `split`, `statistics`, and `reading` if that has a name.
          metrics: values by name. A run that was stopped and continued writes the same values.
          more: further values, only for the boards.
        """
        if self._file is None:
            return
        self._file.write(json.dumps(row | metrics) + "\n")
        self._file.flush()
        update, split = row["update"], row["split"]
        scalars = {f"{split}/{name}": v for name, v in {**metrics, **(more or {})}.items()}
        for board in self._boards:
            board.write(scalars, update)
        line = f"update {update:>6}  {self._data} {describe(row)}  {format_metrics(metrics)}"
        if split != "train":
            self._flush_boards()
            self._console.print(line)
            return
        self._progress.update(self._bar, completed=update, metrics=format_metrics(metrics))
        if not self._console.is_terminal and time.monotonic() - self._logged > SECONDS_LOGGED:
            (bar,) = self._progress.tasks
            self._console.print(f"{line}  {time_left(bar.time_remaining)}")
            self._logged = time.monotonic()

    def sync(self) -> None:
        """Flushes the metrics to the disk, before a checkpoint that relies on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        self._flush_boards()

    def _flush_boards(self) -> None:
        for board in self._boards:
            board.flush()


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics as text: `loss 0.5120  accuracy 0.8400`."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
