"""Makes `experiments/records/milestones.json` of runs: what a new run is held against.

    python -m scripts.milestones --runs=results/runs

Of each config that has runs, and each kind of model: the first validations that all its seeds have,
and the paper's value there, if its figure has one.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.records import milestones, runs
from experiments.records.runs import Experiment, Run
from experiments.reporting import paper
from experiments.reporting.curves import shared_points
from experiments.runtime import cli, files, paths
from experiments.runtime.errors import UserError

POINTS = 6  # of each experiment
# By config: the metric, and the file of the paper's curve.
CURVES = {
    "digits": ("accuracy", None),
    "mnist": ("accuracy", "mnist_valid_accuracy"),
    "pmnist": ("accuracy", "pmnist_valid_accuracy"),
    "ptb": ("bits_per_character", "ptb_valid_bpc"),
}


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("runs", "results/runs", "Folder with runs in it.")


def points_of(experiment: Experiment, there: list[Run]) -> list[dict[str, Any]]:
    """Lowest and highest validation over seeds, at no more than `POINTS` updates."""
    metric, curve = CURVES[experiment.config]
    updates, values = shared_points(there, "valid", metric)
    published = None if curve is None else paper.curves(curve)[(experiment.kind,)]
    points = []
    places = np.geomspace(1, len(updates), POINTS) if len(updates) else ()  # dense early
    for column in np.unique(np.rint(places).astype(int)) - 1:
        update, there_then = updates[column], values[:, column].tolist()
        theirs = None if published is None else paper.at(published, update)
        points.append(
            {
                "update": int(update),
                "low": round(min(there_then), 4),
                "high": round(max(there_then), 4),
                "seeds": len(there_then),
                "paper": None if theirs is None or np.isnan(theirs) else round(theirs, 4),
            }
        )
    return points


def make(folder: Path) -> list[dict[str, Any]]:
    """All milestones, of the runs in a folder."""
    every = runs.find(folder)
    found = []
    for config, (metric, _) in CURVES.items():
        for kind in ("lstm", "bn_lstm"):
            experiment = Experiment(config, kind)
            if there := runs.of(experiment, every):
                known = {"config": config, "kind": kind, "metric": metric}
                found.append({**known, "points": points_of(experiment, there)})
    return found


def main(_: list[str]) -> None:
    """Writes the file, and says where it is."""
    folder = Path(flags.FLAGS.runs)
    if not folder.is_dir():
        raise UserError(f"--runs={folder} is not a folder")
    files.write_json(milestones.PATH, make(folder))
    print(milestones.PATH)


if __name__ == "__main__":
    cli.run(main, define_flags)
