"""Draws population statistics by time step, as the paper's appendix does.

    python -m scripts.plot_statistics --workdir=runs/ptb_bn_lstm

Mean and variance of the recurrent term and of the cell, each line a unit, a random few of them: of
the best checkpoint so far of any BN-LSTM, re-estimated where the run is finished, else its running
averages. It needs the folder of the run alone, not the data.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict

from experiments import cli, paths, workdir
from experiments.checkpoints import read_best
from experiments.compare import LABELS
from experiments.errors import UserError
from experiments.metrics import STATISTICS
from scripts import pictures

PICTURE_NAME = "population_statistics.png"
TERMS = {"recurrent": "recurrent term $h_{t-1} W_h$", "cell": "cell $c_t$"}
MOMENTS = {"mean": "mean", "var": "variance"}


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("workdir", None, "Folder of a BN-LSTM's run.", required=True)
    paths.DEFINE_path(
        "output", None, f"Picture to write, by default {PICTURE_NAME} in the folder of the run."
    )
    flags.DEFINE_integer("units", 30, "Number of units of each term.", lower_bound=1)
    flags.DEFINE_integer("steps", None, "Number of time steps, by default all.", lower_bound=1)


def find_statistics(batch_stats: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """What there is of `TERMS`, each `[max_steps, F]`, under names as `recurrent_mean`, by layer.

    Layers are found by these names, whatever their own are.
    """
    names = [f"{term}_{moment}" for term in TERMS for moment in MOMENTS]
    layers: dict[str, dict[str, np.ndarray]] = {}
    for (*layer, name), value in flatten_dict(batch_stats).items():
        if name in names:
            layers.setdefault("/".join(layer), {})[name] = np.asarray(value)
    return layers


def draw_statistics(
    statistics: dict[str, np.ndarray], units: int, steps: int | None, title: str
) -> Any:
    """A figure of a layer's statistics: a row for each moment, a column for each term.

    Shows the first `steps` time steps of some `units`, always the same ones.

    Raises:
      UserError: matplotlib is not installed.
    """
    terms = [term for term in TERMS if f"{term}_mean" in statistics]
    figure = pictures.new_figure(title, 4.5 * len(terms), 6)
    from matplotlib import colormaps

    panels = figure.subplots(len(MOMENTS), len(terms), sharex=True, squeeze=False)
    for column, term in zip(panels.T, terms, strict=True):
        column[0].set_title(TERMS[term], fontsize="medium")
        column[-1].set_xlabel("time step")
        features = statistics[f"{term}_mean"].shape[1]
        chosen = np.random.default_rng(1).permutation(features)[:units]
        colors = colormaps["viridis"](np.linspace(0, 0.8, len(chosen)))  # they differ in print, too
        for axes, (moment, label) in zip(column, MOMENTS.items(), strict=True):
            values = statistics[f"{term}_{moment}"]
            axes.set_prop_cycle(color=colors)
            axes.plot(values[:steps, chosen], linewidth=0.7)
            axes.set_ylabel(label)
            pictures.tidy(axes)
        column[-1].set_ylim(0, None)  # of the variance
    return figure


def main(_: list[str]) -> None:
    """Draws the picture, and says where it is."""
    given = flags.FLAGS
    folder = Path(given.workdir)
    config = workdir.read_config(folder)
    label = LABELS[config.model.kind]
    update, variables, which = read_best(folder)
    layers = find_statistics(variables.get("batch_stats", {}))
    if not layers:
        raise UserError(
            f"--workdir={folder} has no statistics to draw: its model, {label}, normalises neither "
            "the recurrent term nor the cell"
        )
    layer, statistics = min(layers.items())
    data = workdir.read_record(folder)["dataset"]
    title = f"{data}, {label}, update {update:,}"
    if len(layers) > 1:
        title += f", {layer} of {len(layers)} layers"
    figure = draw_statistics(statistics, given.units, given.steps, f"{title}\n{STATISTICS[which]}")
    picture = Path(given.output or folder / PICTURE_NAME)
    pictures.save(figure, picture)
    print(f"{STATISTICS[which].capitalize()}, of update {update:,}: {picture}")


if __name__ == "__main__":
    cli.run(main, define_flags)
