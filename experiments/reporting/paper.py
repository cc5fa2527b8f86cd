"""The paper's results: the numbers of its tables, and its curves."""

import csv
import functools
from pathlib import Path

import numpy as np

from experiments.records.runs import Experiment

FOLDER = Path(__file__).parent / "paper_curves"

# Test results by config and kind of model: accuracy, bits per character, or error.
TABLES = {
    "mnist": {"lstm": "0.989", "bn_lstm": "0.990"},
    "pmnist": {"lstm": "0.902", "bn_lstm": "0.954"},
    "ptb": {"lstm": "1.38", "bn_lstm": "1.32"},
    "text8": {"lstm": "1.43", "bn_lstm": "1.36"},
    "cnn_qa": {"lstm": "0.450", "bn_e_star_star": "0.363"},
}
# Runs whose settings differ from those of their config.
EXPERIMENTS = {
    ("cnn_qa", "lstm"): Experiment("cnn_qa", "lstm", num_updates=400_000),
    ("cnn_qa:four_sentences", "bn_e_star"): Experiment(
        "cnn_qa:four_sentences",
        "bn_e_star",
        (
            ("batch_size", 40),
            ("population_batch_size", 40),
            ("optimizer.learning_rate", 8e-4),
        ),
    ),
}
# The derivative of tanh: standard deviations and means; then standard deviations and quartiles.
TANH_MEANS = np.array(
    [
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        [0.990, 0.963, 0.923, 0.877, 0.826, 0.778, 0.727, 0.685, 0.643, 0.608],
    ]
)
TANH_QUARTILES = (
    (0.25, 0.923, 0.994),
    (0.5, 0.728, 0.974),
    (0.75, 0.515, 0.945),
    (1.0, 0.335, 0.907),
)


def experiment(config: str, kind: str) -> Experiment:
    """The paper's run of a kind of model."""
    return EXPERIMENTS.get((config, kind), Experiment(config, kind))


@functools.cache
def curves(name: str) -> dict[tuple[str, ...], np.ndarray]:
    """The lines of a figure, each `[2, points]`, x and y, by the first columns of its file.

    `name` is the name of a file in `paper_curves`, whose last two columns are x and y. Thousands of
    updates become updates; the paper counts the first thousand as 0.
    """
    with (FOLDER / f"{name}.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    lines: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for *line, x, y in rows:
        update = 1000 * (float(x) + 1) if header[-2] == "thousand_updates" else float(x)
        lines.setdefault(tuple(line), []).append((update, float(y)))
    return {line: np.array(points).T for line, points in lines.items()}


def at(curve: np.ndarray, x: float) -> float:
    """A curve's y at x, linear between points; NaN beyond its ends."""
    return float(np.interp(x, *curve, left=np.nan, right=np.nan))
