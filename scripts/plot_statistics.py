"""Plots population statistics by time step, as in the paper's appendix.

    python -m scripts.plot_statistics --workdir=runs/ptb_bn_lstm

It plots mean and variance of the recurrent term and of the cell, one line per unit for a few random
units. Statistics are those of the best checkpoint so far: re-estimated if the run is finished, else
running averages. It needs only the folder of the run, not the data.
"""

from pathlib import Path

from absl import flags

from experiments.records import workdir
from experiments.records.checkpoints import read_best
from experiments.records.metrics import STATISTICS
from experiments.reporting import pictures
from experiments.reporting.compare import LABELS
from experiments.reporting.statistics_figure import draw_statistics, find_statistics
from experiments.runtime import cli, paths
from experiments.runtime.errors import UserError

PICTURE_NAME = "population_statistics.png"


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("workdir", None, "Folder of a BN-LSTM's run.", required=True)
    paths.DEFINE_path(
        "output", None, f"Picture to write, by default {PICTURE_NAME} in the folder of the run."
    )
    flags.DEFINE_string("layer", None, "Layer of a model with several; by default the first.")
    flags.DEFINE_integer("units", 30, "Number of units of each term.", lower_bound=1)
    flags.DEFINE_integer("steps", None, "Number of time steps, by default all.", lower_bound=1)


def main(_: list[str]) -> None:
    """Draws the picture, and prints its path."""
    given = flags.FLAGS
    folder = Path(given.workdir)
    config = workdir.read_config(folder)
    label = LABELS[config.model.kind]
    update, variables, which = read_best(folder)
    layers = find_statistics(variables.get("batch_stats", {}))
    if not layers:
        raise UserError(
            f"--workdir={folder} has no statistics by time step to draw: its model, {label}, "
            "normalises neither the recurrent term nor the cell, or all time steps share statistics"
        )
    layer = given.layer or min(layers)
    if layer not in layers:
        raise UserError(f"--layer={layer}: the model has {', '.join(sorted(layers))}")
    data = workdir.read_record(folder)["dataset"]
    title = f"{data}, {label}, update {update:,}"
    if len(layers) > 1:
        title += f", {layer} of {len(layers)} layers"
    figure = draw_statistics(
        layers[layer], given.units, given.steps, f"{title}\n{STATISTICS[which]}"
    )
    picture = Path(given.output or folder / PICTURE_NAME)
    pictures.save(figure, picture)
    print(f"{STATISTICS[which].capitalize()}, of update {update:,}: {picture}")


if __name__ == "__main__":
    cli.run(main, define_flags)
