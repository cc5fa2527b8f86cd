"""Learning curves beside the paper's.

The paper's lines are thin and black, ours thick and coloured, with a band from the lowest to the
highest seed. A kind of model has the same dashes in both, so that print in grey tells them apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.records.runs import Experiment, Run
from experiments.reporting import paper, pictures
from experiments.runtime import markdown

Found = dict[Experiment, list[Run]]
PAPER_STYLE = {"color": "black", "linewidth": 0.8}


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """A line of the paper, and of which experiment and metric it is.

    Attributes:
      published: `[2, points]`, updates and values.
    """

    experiment: Experiment
    label: str
    color: str
    dashes: Any
    split: str
    metric: str
    published: np.ndarray


def learning_curves(
    title: str, columns: dict[str, list[Line]], whole: int, ylim: tuple[float, float]
) -> Callable[[Found], tuple[str, Any]]:
    """Makes a figure of learning curves, and a table of points at which both have values.

    `columns` are lines by what the y axis says. The figure has the paper's axes, up to update
    `whole` and from `ylim[0]` to `ylim[1]`; where ours have not come far, more panels show the
    first updates alone.
    """

    def show(found: Found) -> tuple[str, Any]:
        every = [line for lines in columns.values() for line in lines]
        last = max(points_of(line, found)[0].max(initial=0) for line in every)
        limits = [whole, 1.1 * last] if 0 < last < 0.5 * whole else [whole]
        shape = (1, len(limits)) if len(columns) == 1 else (len(limits), len(columns))
        figure = pictures.new_figure(title, 4.8 * shape[1], 3.4 * shape[0])
        panels = figure.subplots(*shape, squeeze=False).reshape(len(limits), len(columns))
        for row, limit in zip(panels, limits, strict=True):
            for axes, (label, lines) in zip(row, columns.items(), strict=True):
                for line in lines:
                    draw(axes, line, found)
                axes.set(xlim=(0, limit), ylim=ylim, xlabel="update", ylabel=label)
                axes.locator_params(axis="x", nbins=5)
                axes.xaxis.set_major_formatter("{x:,.0f}")
                if limit != whole:
                    axes.set_ylim(*range_of(lines, found, limit))
                    axes.set_title("as far as measured here", fontsize="small")
                pictures.tidy(axes)
        legend(panels[0, -1], every, found)
        return curve_table(every, found), figure

    return show


def curves_by_hours(
    title: str, label: str, lines: list[Line], points: int = 6
) -> Callable[[Found], tuple[str, Any]]:
    """Makes a figure of our learning curves by hours of training, and a table of some hours.

    The table has the latest value at each of `points` times, up to the end of the run that took
    least. Machines are those of the runs.
    """

    def show(found: Found) -> tuple[str, Any]:
        curves = {
            line: [run.curve_by_hours(line.split, line.metric) for run in found[line.experiment]]
            for line in lines
        }
        curves = {line: [c for c in of_line if c.size] for line, of_line in curves.items()}
        every = [curve for of_line in curves.values() for curve in of_line]
        if not every:
            return "", None
        figure = pictures.new_figure(title, 6, 4)
        axes = figure.subplots()
        for line, of_line in curves.items():
            style = {"color": line.color, "linestyle": line.dashes, "linewidth": 1.5}
            for seed, curve in enumerate(of_line):
                axes.plot(*curve, label=None if seed else line.label, **style)
        axes.set(xlabel="hours", ylabel=label, xlim=(0, None))
        axes.legend(fontsize="small")
        pictures.tidy(axes)
        rows = []
        for hours in np.linspace(0, min(curve[0, -1] for curve in every), points + 1)[1:]:
            values = [
                [value for curve in of_line for value in curve[1, curve[0] <= hours][-1:]]
                for of_line in curves.values()
            ]
            rows.append([f"{hours:.2f}", *map(spread, values)])
        return markdown.table(["hours", *(line.label for line in lines)], rows), figure

    return show


def points_of(line: Line, found: Found) -> tuple[np.ndarray, np.ndarray]:
    """Of our runs, as `shared_points` has them."""
    return shared_points(found[line.experiment], line.split, line.metric)


def shared_points(runs: list[Run], split: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Updates at which all runs have a metric, `[n]`, and its values `[runs, n]`."""
    curves = [run.curve(split, metric) for run in runs]
    curves = [curve for curve in curves if curve.size]
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    shared = curves[0][0]
    for updates, _ in curves:
        shared = np.intersect1d(shared, updates)
    return shared, np.array([values[np.isin(updates, shared)] for updates, values in curves])


def draw(axes: Any, line: Line, found: Found) -> None:
    """Draws the paper's line, and ours: the mean of seeds and their range."""
    axes.plot(*line.published, linestyle=line.dashes, **PAPER_STYLE)
    updates, values = points_of(line, found)
    if updates.size:
        style = {"color": line.color, "linestyle": line.dashes, "linewidth": 2}
        marker = "o" if updates.size < 10 else None  # a single point is no line
        axes.plot(updates, values.mean(0), marker=marker, **style)
        axes.fill_between(updates, values.min(0), values.max(0), color=line.color, alpha=0.25)


def range_of(lines: list[Line], found: Found, limit: float) -> tuple[float, float]:
    """From the lowest to the highest value up to an update, with some space around."""
    values = [line.published[1][line.published[0] <= limit] for line in lines]
    values += [points_of(line, found)[1].ravel() for line in lines]
    low, high = np.min(np.concatenate(values)), np.max(np.concatenate(values))
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def legend(axes: Any, lines: list[Line], found: Found) -> None:
    """Names each line once, and says whose are thin."""
    from matplotlib.lines import Line2D

    handles = {}
    for line in lines:
        label, style = line.label, {"color": line.color, "linewidth": 2}
        if not found[line.experiment]:
            label, style = f"{label} (paper only)", PAPER_STYLE
        handles[label] = Line2D([], [], label=label, linestyle=line.dashes, **style)
    thin = Line2D([], [], label="thin: the paper's", **PAPER_STYLE)
    axes.legend(handles=[*handles.values(), thin], fontsize="small", handlelength=3)


def curve_table(lines: list[Line], found: Found, points: int = 6) -> str:
    """Where both have values: at most so many updates of each line, the last among them."""
    rows = []
    for line in lines:
        updates, values = points_of(line, found)
        if not len(updates):
            continue
        for column in np.unique(np.linspace(0, len(updates) - 1, points).round().astype(int)):
            theirs = paper.at(line.published, updates[column])
            if np.isnan(theirs):
                continue
            ours = spread(list(values[:, column]))
            at = f"{updates[column]:,.0f}"
            rows.append([line.label, line.split, at, f"{theirs:.4f}", ours, str(len(values))])
    header = ["line", "split", "update", "paper", "here", "seeds"]
    return markdown.table(header, rows) if rows else ""


def spread(values: list[float], digits: int = 4) -> str:
    """The mean over seeds, and their range."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
