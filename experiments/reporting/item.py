"""The base class of the paper's tables and figures; `items.py` lists them."""

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.records import runs
from experiments.records.runs import Experiment, Run

Found = dict[Experiment, list[Run]]


class Table(NamedTuple):
    """A table of plain text, as `markdown.table` takes it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Shown(NamedTuple):
    """The content of an item: a table and a Matplotlib figure, each of which may be None."""

    table: Table | None = None
    figure: Any = None


@dataclasses.dataclass(frozen=True)
class Item(abc.ABC):
    """A table or figure.

    Attributes:
      title: one line.
      remark: a note for the reader.
    """

    title: str
    remark: str = dataclasses.field(default="", kw_only=True)

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """The experiments whose runs it shows."""
        return ()

    @abc.abstractmethod
    def show(self, found: Found, data_dir: str) -> Shown:
        """Shows the runs of its experiments; `data_dir` is for figures that need data, not runs."""


def find(items: Iterable[Item], folder: Path) -> Found:
    """The runs in a folder, by experiment, for all experiments of some items."""
    every = runs.find(folder)
    experiments = dict.fromkeys(e for item in items for e in item.experiments)
    return {experiment: runs.of(experiment, every) for experiment in experiments}


def spread(values: Sequence[float]) -> str:
    """The mean over seeds, and their range."""
    if not len(values):
        return "-"
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def duration(seconds: float) -> str:
    """Hours and minutes: `1:05 h`."""
    return f"{seconds // 3600:,.0f}:{seconds % 3600 // 60:02.0f} h"


def wall_time(run: Run) -> str:
    """The time of all starts of a run; `-` if one was killed or is in progress."""
    return "-" if run.seconds is None else duration(run.seconds)
