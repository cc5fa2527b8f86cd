"""The figure of population statistics by time step, as in the paper's appendix."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from experiments.records import workdir
from experiments.records.metrics import STATISTICS
from experiments.records.runs import Experiment
from experiments.reporting import pictures
from experiments.reporting.item import Found, Item, Shown

TERMS = {"recurrent": "recurrent term $h_{t-1} W_h$", "cell": "cell $c_t$"}
MOMENTS = {"mean": "mean", "var": "variance"}


def find_statistics(batch_stats: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """The statistics of `TERMS` by time step `[max_steps, F]`, by layer and name.

    A name is, for example, `recurrent_mean`. Statistics that time steps share are left out.
    """
    names = [f"{term}_{moment}" for term in TERMS for moment in MOMENTS]
    layers: dict[str, dict[str, np.ndarray]] = {}
    for (*layer, name), value in flatten_dict(batch_stats).items():
        if name in names and np.ndim(value) == 2:
            layers.setdefault("/".join(layer), {})[name] = np.asarray(value)
    return layers


def draw_statistics(
    statistics: dict[str, np.ndarray], units: int, steps: int | None, title: str
) -> Any:
    """A figure of a layer's statistics: a row for each moment, a column for each term.

    Shows the first `steps` time steps of a fixed random choice of `units`.

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
        colors = colormaps["viridis"](np.linspace(0, 0.8, len(chosen)))  # distinct in grey, too
        for axes, (moment, label) in zip(column, MOMENTS.items(), strict=True):
            values = statistics[f"{term}_{moment}"]
            axes.set_prop_cycle(color=colors)
            axes.plot(values[:steps, chosen], linewidth=0.7)
            axes.set_ylabel(label)
            pictures.tidy(axes)
        column[-1].set_ylim(0, None)  # of the variance
    return figure


class PopulationStatistics(Item):
    """Population statistics by time step, of the Penn Treebank BN-LSTM with the most updates."""

    experiments = (Experiment("ptb", "bn_lstm"),)

    def show(self, found: Found, data_dir: str) -> Shown:
        """The figure."""
        for run in sorted(found[self.experiments[0]], key=lambda run: -run.updates):
            update = run.results.get("update")
            statistics = update and workdir.read_statistics(run.folder, update)
            if statistics:
                _, values = min(find_statistics(statistics).items())
                title = f"Penn Treebank, BN-LSTM, update {update:,}\n{STATISTICS['population']}"
                return Shown(figure=draw_statistics(values, units=30, steps=49, title=title))
        return Shown()
