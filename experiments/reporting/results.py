"""Final test results beside the paper's: as a table, and by length of segments."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.records.metrics import FINAL
from experiments.records.runs import Experiment, Run
from experiments.reporting import paper, pictures
from experiments.reporting.compare import LABELS, STYLES
from experiments.reporting.curves import PAPER_STYLE
from experiments.reporting.item import Found, Item, Shown, Table, spread, wall_time

OURS = ("here", "updates", "runs", "wall time of each seed")

# The lines by length: the paper's name, our model and statistics, label and dashes.
LENGTH_LINES = {
    "lstm": ("lstm", "none", "LSTM", "--"),
    "bn_lstm_population_statistics": ("bn_lstm", "population", "BN-LSTM, population", "-"),
    "bn_lstm_batch_statistics": ("bn_lstm", "batch", "BN-LSTM, batch statistics", ":"),
}


def test_values(
    runs: list[Run], metric: str, statistics: tuple[str, ...] = FINAL, reading: str | None = None
) -> list[float]:
    """A metric of final test results with one of `statistics`, of each run that has it."""
    rows = [row for run in runs for row in run.results.get("rows", []) if row["split"] == "test"]
    rows = [row for row in rows if row.get("reading") == reading]
    return [row[metric] for row in rows if row["statistics"] in statistics]


def longest(
    runs: list[Run], metric: str, statistics: tuple[str, ...], reading: str | None
) -> list[Run]:
    """Of the runs with `test_values`, those with the most updates; others would spoil the mean."""
    runs = [run for run in runs if test_values([run], metric, statistics, reading)]
    most = max((run.results["updates"] for run in runs), default=0)
    return [run for run in runs if run.results["updates"] == most]


@dataclasses.dataclass(frozen=True)
class ResultsTable(Item):
    """Test results with re-estimated population statistics, a row for each experiment.

    If runs have results with input terms normalised by the batch, these have a second row.

    Attributes:
      metric: metric of the results.
      tasks: names of tasks by config. `paper.TABLES` gives the kinds of model.
      reading: how the test split is read, if there are several ways.
    """

    metric: str
    tasks: dict[str, str]
    reading: str | None = None

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """Each kind of model on each task."""
        return tuple(
            paper.experiment(task, kind) for task in self.tasks for kind in paper.TABLES[task]
        )

    @property
    def metric_name(self) -> str:
        """The metric in words."""
        return self.metric.replace("_", " ")

    def rows(self, found: Found) -> Iterator[list[str]]:
        """Task, model, the paper's result, ours, updates trained, the runs' folder, their times.

        The updates are those at the evaluation. Seeds with fewer are left out.
        """
        ways = {"": FINAL, ", input terms by the batch": ("population_batch_inputs",)}
        for experiment in self.experiments:
            updates = f"{experiment.get_config().num_updates:,}"
            for way, statistics in ways.items():
                key = self.metric, statistics, self.reading
                there = longest(found[experiment], *key)
                if there or not way:
                    yield [
                        self.tasks[experiment.config],
                        LABELS[experiment.kind] + way,
                        paper.TABLES[experiment.config][experiment.kind],
                        spread(test_values(there, *key)),
                        f"{there[0].results['updates']:,} of {updates}" if there else "not run",
                        str(experiment) if there else "-",
                        ", ".join(map(wall_time, there)) or "-",
                    ]

    def show(self, found: Found, data_dir: str) -> Shown:
        """The table."""
        header = ["task", "model", f"paper, test {self.metric_name}"]
        return Shown(Table([*header, *OURS], [*self.rows(found)]))


class ResultsByLength(Item):
    """Bits per character on Penn Treebank by length of the test segments, of the longest runs."""

    experiments = (Experiment("ptb", "lstm"), Experiment("ptb", "bn_lstm"))

    def show(self, found: Found, data_dir: str) -> Shown:
        """The figure, and its points as a table."""
        figure = pictures.new_figure(self.title, 6, 4)
        axes = figure.subplots()
        rows = []
        for name, (kind, statistics, label, dashes) in LENGTH_LINES.items():
            lengths, published = paper.curves("ptb_test_bpc_by_length")[(name,)]
            axes.plot(lengths, published, linestyle=dashes, **PAPER_STYLE)
            runs, ours = found[Experiment("ptb", kind)], []
            for length in lengths:
                key = "bits_per_character", (statistics,), f"segments of {length:.0f}"
                ours.append(test_values(longest(runs, *key), *key))
            points = [(x, np.mean(y)) for x, y in zip(lengths, ours, strict=True) if y]
            if points:
                style: dict[str, Any] = {"color": STYLES[kind][0], "linestyle": dashes}
                axes.plot(*zip(*points, strict=True), marker="o", linewidth=2, label=label, **style)
            rows += [
                [label, f"{length:.0f}", f"{theirs:.4f}", spread(values)]
                for length, theirs, values in zip(lengths, published, ours, strict=True)
            ]
        axes.plot([], [], label="thin: the paper's", **PAPER_STYLE)
        axes.legend(fontsize="small")
        axes.set(xlabel="characters", ylabel="bits per character")
        pictures.tidy(axes)
        return Shown(Table(["line", "length", "paper", "here"], rows), figure)
