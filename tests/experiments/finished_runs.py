"""Compares finished runs."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from experiments.records import checkpoints, metrics, results_file, workdir

COMPARED = (metrics.FILE_NAME, results_file.NAME, "config.json")


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """Describes the differences between two finished runs: files and arrays, bit by bit."""
    for name in COMPARED:
        if (ours / name).read_bytes() != (theirs / name).read_bytes():
            yield f"{name} differs"
    rows = [(row["update"], row["split"]) for row in metrics.read_metrics(ours)]
    if len(rows) != len(set(rows)):
        yield f"{metrics.FILE_NAME} has a row twice"
    a, b = final_arrays(ours), final_arrays(theirs)
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            yield f"one run alone has {name}"
        elif (a[name].dtype, a[name].tobytes()) != (b[name].dtype, b[name].tobytes()):
            yield f"{name} differs"


def final_arrays(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a finished run, by name: latest and best checkpoint, population statistics."""
    saved = folder / "checkpoints"
    best = json.loads((folder / results_file.NAME).read_text())["update"]
    found = {}
    for kind, step in ("latest", checkpoints.steps_in(saved)[0]), ("best", best):
        arrays = checkpoints.read_checkpoint(saved, step)
        found[f"{kind} checkpoint"] = {"update": step, **arrays}
    if (folder / workdir.STATISTICS_NAME).exists():
        with np.load(folder / workdir.STATISTICS_NAME) as file:
            found[workdir.STATISTICS_NAME] = dict(file)
    flat = flatten_dict(found, sep="/")
    return {name: np.asarray(array) for name, array in flat.items()}
