"""Learning curves beside the paper's.

The paper's lines are thin and black, ours thick and coloured, with a band from the lowest to the
highest seed. Both have the same dashes, so that lines differ in grey print.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from experiments.records.runs import Experiment
from experiments.reporting import paper, pictures
from experiments.reporting.compare import LABELS, LONG_DASHES, STYLES
from experiments.reporting.item import Found, Item, Shown, Table, spread

PAPER_STYLE: dict[str, Any] = {"color": "black", "linewidth": 0.8}
GAMMAS = {  # of the paper's figures, with colour and dashes
    0.1: ("tab:blue", "-"),
    0.3: ("tab:orange", "--"),
    0.5: ("tab:green", "-."),
    0.7: ("tab:red", ":"),
    1.0: ("tab:purple", LONG_DASHES),
}


class Line(NamedTuple):
    """A line of a figure.

    Attributes:
      split, metric: split and metric of our runs.
      file: file of the paper's figure, in `paper_curves`.
      name: name of the paper's line in its file.
    """

    experiment: Experiment
    label: str
    color: str
    dashes: Any
    split: str
    metric: str
    file: str
    name: str

    @property
    def axis(self) -> str:
        """The label of its y axis."""
        metric = "cross-entropy (nats)" if self.metric == "loss" else self.metric.replace("_", " ")
        return f"{'training' if self.split == 'train' else 'validation'} {metric}"

    @property
    def published(self) -> np.ndarray:
        """The paper's line, `[2, points]`: updates and values."""
        curves, key = paper.curves(self.file), (self.name, self.split)
        return curves[key if key in curves else key[:1]]  # some files have only validation

    def measured(self, found: Found) -> tuple[np.ndarray, np.ndarray]:
        """Updates at which any of our runs has the metric, `[n]`, and its values `[runs, n]`.

        A run's value is NaN where it has none; non-finite values are left out.
        """
        curves = [run.curve(self.split, self.metric) for run in found[self.experiment]]
        curves = [curve[:, np.isfinite(curve[1])] for curve in curves]
        curves = [curve for curve in curves if curve.size]
        updates = np.unique([update for curve in curves for update in curve[0]])
        values = np.full((len(curves), updates.size), np.nan)
        for row, (of_run, measured) in zip(values, curves, strict=True):
            row[np.searchsorted(updates, of_run)] = measured
        return updates, values


def by_kind(
    file: str, config: str, metric: str, kinds: tuple[str, ...] = ("lstm", "bn_lstm")
) -> list[Line]:
    """Validation lines by kind of model."""
    return [
        Line(
            paper.experiment(config, kind), LABELS[kind], *STYLES[kind], "valid", metric, file, kind
        )
        for kind in kinds
    ]


def by_gamma(file: str, config: str, metric: str, split: str, num_updates: int) -> list[Line]:
    """Lines of BN-LSTMs by initial gamma, which is 0.1 in config files.

    Runs with another gamma are made for this figure alone, and have `num_updates`.
    """
    lines = []
    for gamma, style in GAMMAS.items():
        run = Experiment(config, "bn_lstm", (("model.initial_scale", gamma),), num_updates)
        run = paper.experiment(config, "bn_lstm") if gamma == 0.1 else run
        lines.append(Line(run, f"gamma {gamma}", *style, split, metric, file, str(gamma)))
    return lines


@dataclasses.dataclass(frozen=True)
class LearningCurves(Item):
    """Learning curves on the paper's axes, and a table of their means over windows of updates.

    If our runs are short, more panels show only the first updates.

    Attributes:
      panels: the lines of each panel.
      updates: the end of the x axis.
      ylim: both ends of the y axis.
    """

    panels: list[list[Line]]
    updates: int
    ylim: tuple[float, float]

    @property
    def lines(self) -> list[Line]:
        """The lines of all panels."""
        return [line for lines in self.panels for line in lines]

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """The experiments of the lines."""
        return tuple(dict.fromkeys(line.experiment for line in self.lines))

    def show(self, found: Found, data_dir: str) -> Shown:
        """The figure and the table."""
        last = max(line.measured(found)[0].max(initial=0) for line in self.lines)
        limits = [self.updates, 1.1 * last] if 0 < last < 0.5 * self.updates else [self.updates]
        grid = (1, len(limits)) if len(self.panels) == 1 else (len(limits), len(self.panels))
        figure = pictures.new_figure(self.title, 4.8 * grid[1], 3.4 * grid[0])
        axes = figure.subplots(*grid, squeeze=False).reshape(len(limits), len(self.panels))
        for column, lines in zip(axes.T, self.panels, strict=True):
            label = lines[0].axis
            for panel, limit in zip(column, limits, strict=True):
                for line in lines:
                    draw(panel, line, found)
                panel.set(xlim=(0, limit), ylim=self.ylim, xlabel="update", ylabel=label)
                panel.locator_params(axis="x", nbins=5)
                panel.xaxis.set_major_formatter("{x:,.0f}")
                pictures.tidy(panel)
            for panel in column[1:]:
                panel.set_ylim(range_of(lines, found, limits[1]) or self.ylim)
                panel.set_title("updates measured here", fontsize="small")
        legend(axes[0, -1], self.lines, found)
        return Shown(curve_table(self.lines, found), figure)


@dataclasses.dataclass(frozen=True)
class CurvesByHours(Item):
    """Our validation curves by hours of training, on the machines of the runs.

    The table has the latest values at six times, up to the end of the shortest run. Labels name the
    implementations of the recurrence, which may differ between machines.

    Attributes:
      lines: the lines to draw.
    """

    lines: list[Line]

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """The experiments of the lines."""
        return tuple(line.experiment for line in self.lines)

    def show(self, found: Found, data_dir: str) -> Shown:
        """The figure and the table, once a run has finished."""
        curves = [
            [run.curve_by_hours(line.split, line.metric) for run in found[line.experiment]]
            for line in self.lines
        ]
        curves = [[curve for curve in of_line if curve.size] for of_line in curves]
        ends = [curve[0, -1] for of_line in curves for curve in of_line]
        if not ends:
            return Shown()
        labels = [label_by_hours(line, found) for line in self.lines]
        figure = pictures.new_figure(self.title, 6, 4)
        axes = figure.subplots()
        for line, label, of_line in zip(self.lines, labels, curves, strict=True):
            style: dict[str, Any] = {"color": line.color, "linestyle": line.dashes}
            for seed, curve in enumerate(of_line):
                axes.plot(*curve, **style, label=None if seed else label)
        axes.set(xlabel="hours", ylabel=self.lines[0].axis, xlim=(0, None))
        axes.legend(fontsize="small")
        pictures.tidy(axes)
        rows = []
        for hours in np.linspace(0, min(ends), 7)[1:]:
            latest = [[v for c in of_line for v in c[1, c[0] <= hours][-1:]] for of_line in curves]
            rows.append([f"{hours:.2f}", *map(spread, latest)])
        return Shown(Table(["hours", *labels], rows), figure)


def label_by_hours(line: Line, found: Found) -> str:
    """The line's label, with the implementations of its runs."""
    names = sorted({name for run in found[line.experiment] for name in run.implementations})
    return f"{line.label} ({'; '.join(names)})" if names else line.label


def draw(axes: Any, line: Line, found: Found) -> None:
    """Draws the paper's line, and ours: the mean and range of the seeds that have a value."""
    axes.plot(*line.published, linestyle=line.dashes, **PAPER_STYLE)
    updates, values = line.measured(found)
    if updates.size:
        marker = "o" if updates.size < 10 else None  # a single point is no line
        style = {"color": line.color, "linestyle": line.dashes, "linewidth": 2, "marker": marker}
        axes.plot(updates, np.nanmean(values, 0), **style)
        low, high = np.nanmin(values, 0), np.nanmax(values, 0)
        axes.fill_between(updates, low, high, color=line.color, alpha=0.25)


def range_of(lines: list[Line], found: Found, limit: float) -> tuple[float, float] | None:
    """The range of our values, and of the paper's from our first update on, with some space.

    None if there are no values up to `limit`, or all are equal.
    """
    ours = [line.measured(found) for line in lines]
    first = min((updates[0] for updates, _ in ours if updates.size), default=0)
    of_each = [measured[~np.isnan(measured)] for _, measured in ours]
    for updates, published in (line.published for line in lines):
        of_each.append(published[(first <= updates) & (updates <= limit)])
    values = np.concatenate(of_each)
    if not values.size or values.min() == values.max():
        return None
    low, high = values.min(), values.max()
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def legend(axes: Any, lines: list[Line], found: Found) -> None:
    """Names each line once, and says that thin lines are the paper's."""
    from matplotlib.lines import Line2D

    handles = {}
    for line in lines:
        label, style = line.label, {"color": line.color, "linewidth": 2}
        if not found[line.experiment]:
            label, style = f"{label} (paper only)", PAPER_STYLE
        handles[label] = Line2D([], [], label=label, linestyle=line.dashes, **style)
    thin = Line2D([], [], label="thin: the paper's", **PAPER_STYLE)
    axes.legend(handles=[*handles.values(), thin], fontsize="small", handlelength=3)


def curve_table(lines: list[Line], found: Found) -> Table | None:
    """Means over windows of updates at which both the paper and our runs have values.

    Each window is of the seeds that have values at all its updates, and left out if none has.
    Single validations are noisy. Learning slows down, so each window is as long as all windows
    before it together: the first update, the second, the next two, the next four.
    """
    rows = []
    for line in lines:
        updates, values = line.measured(found)
        theirs = np.array([paper.at(line.published, update) for update in updates])
        both = ~np.isnan(theirs)
        updates, values, theirs = updates[both], values[:, both], theirs[both]
        for window in doubling(updates):
            first, last = updates[window][[0, -1]]
            span = f"{first:,.0f}" if first == last else f"{first:,.0f} to {last:,.0f}"
            means = values[:, window].mean(1)
            means = means[~np.isnan(means)]
            if means.size:
                compared = f"{theirs[window].mean():.4f}", spread(means)
                rows.append([line.label, line.split, span, *compared, str(means.size)])
    header = ["line", "split", "updates", "paper", "here", "seeds"]
    return Table(header, rows) if rows else None


def doubling(updates: np.ndarray) -> list[np.ndarray]:
    """Indices of the windows that end at the first update, twice it, four times it, and so on."""
    if not updates.size:
        return []
    window = np.ceil(np.log2(updates / updates[0]))
    return [np.flatnonzero(window == number) for number in np.unique(window)]
