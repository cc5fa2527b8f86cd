"""The figure of population statistics by time step, as in the paper's appendix."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from experiments.reporting import pictures

TERMS = {"recurrent": "recurrent term $h_{t-1} W_h$", "cell": "cell $c_t$"}
MOMENTS = {"mean": "mean", "var": "variance"}


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
