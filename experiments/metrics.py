"""What a run tells while it goes: a progress bar, a plain file of metrics, TensorBoard."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from tensorboardX import SummaryWriter

from experiments.workdir import write_text

FILE_NAME = "metrics.jsonl"
SECONDS_SHOWN = 0.5  # between movements of the progress bar
# What normalised, as it is written in files, and as it is named wherever people read a number.
STATISTICS = {
    "batch": "batch statistics",
    "running": "population statistics, running average",
    "population": "population statistics, re-estimated",
    "none": "no normalisation",
}

T = TypeVar("T")


class UpdatesPerSecond(ProgressColumn):
    """Speed, in updates per second."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f} updates/s" if speed else "- updates/s")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics file, oldest first."""
    path = workdir / FILE_NAME
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


class Reporter:
    """Shows and writes the metrics of a run that goes on from update `start`.

    Rows that a stopped run has written past `start` are dropped, to be written again.
    """

    def __init__(self, workdir: Path, title: str, start: int, num_updates: int) -> None:
        """Opens the metrics file and TensorBoard's in `workdir`."""
        rows = [row for row in read_metrics(workdir) if row["update"] <= start]
        path = workdir / FILE_NAME
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self.console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            UpdatesPerSecond(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=self.console,
            # A log file gets the lines of `write` alone, not a bar for each of them.
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task(
            title, total=num_updates, completed=start, metrics="compiling"
        )
        self._shown = time.monotonic()
        self._progress.start()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        self._file.close()
        self._tensorboard.close()

    def advance(self, step: jax.Array) -> None:
        """Moves the progress bar to an update that may still be under way on the device.

        The device is waited for, now and then, so that the bar shows what is done rather than what
        has been asked for.
        """
        if time.monotonic() - self._shown > SECONDS_SHOWN:
            self._progress.update(self._bar, completed=int(step))
            self._shown = time.monotonic()

    def write(self, update: int, split: str, statistics: str, metrics: dict[str, float]) -> None:
        """Adds a row to the metrics file and to TensorBoard, and shows it."""
        row = {"update": update, "split": split, "statistics": statistics, **metrics}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, update)
        if split == "train":
            self._progress.update(self._bar, completed=update, metrics=format_metrics(metrics))
        else:
            self.console.print(
                f"update {update:>6}  {split} ({STATISTICS[statistics]})  {format_metrics(metrics)}"
            )


def track(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """The items, under a progress bar that is gone when they are."""
    terminal = Console().is_terminal
    return rich.progress.track(items, title, total, transient=True, disable=not terminal)


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics as people read them: `loss 0.512  accuracy 0.840`."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that reads well as it is and in Markdown."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
