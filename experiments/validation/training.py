"""Trains one model by several implementations side by side, and compares their losses.

All runs have the same seed and batches. Losses are compared with the first run's losses. A second
run of the first implementation starts from parameters that are each moved by one rounding, 2^-23 of
their value. Implementations that differ only by rounding stay about as close as these two runs.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bnlstm_jax.recurrence.devices import default_device
from experiments import config as configs
from experiments import tasks, train_step
from experiments.benchmarking import timing
from experiments.runtime import files, markdown

SPANS = (10, 50, 100, 200, 500, 1000)  # numbers of updates in the table
MOVED = "parameters moved by a rounding"


def run(
    base: ConfigDict,
    title: str,
    implementations: Sequence[str],
    updates: int,
    seconds: float,
    output: Path,
) -> None:
    """Trains on the default device; prints a table and writes the losses.

    Args:
      base: the config of one model.
      title: its name in the report.
      implementations: of the recurrence.
      updates: maximum number of updates of each run.
      seconds: time limit of training.
      output: JSON file of all losses.
    """
    configs.check(base)
    losses = compare(base, implementations, updates, seconds)
    print(f"{title}\n\n{table(losses)}\n\nLosses: {output}")
    record = timing.circumstances(default_device()) | {"config": title, "losses": losses}
    files.write_json(output, record)


def compare(
    base: ConfigDict, implementations: Sequence[str], updates: int, seconds: float
) -> dict[str, list[float]]:
    """The training loss of every batch, in nats, by run."""
    deadline = time.monotonic() + seconds
    states, steps = {}, {}
    first, *others = implementations
    for name in (first, f"{first}, {MOVED}", *others):
        config = base.copy_and_resolve_references()
        config.model.implementation = name.partition(",")[0]
        task = tasks.load(config)  # batches are the same in all runs
        states[name] = train_step.create_state(task, config)
        if name.endswith(MOVED):
            states[name] = states[name].replace(params=moved(states[name].params))
        steps[name] = train_step.make_train_step(task, train_step.random_keys(config.seed)[1])
    losses: dict[str, list[float]] = {name: [] for name in states}
    for update in range(updates):
        batch = task.train_batch(update)
        for name, step in steps.items():
            state = step(states[name], batch)
            total, count = state.window["loss"]
            losses[name].append(float(total / count))
            states[name] = state.replace(window=jax.tree.map(jnp.zeros_like, state.window))
        if time.monotonic() > deadline:
            break
    return losses


def moved(params: Any) -> Any:
    """Parameters that are each moved by about one rounding, up or down."""
    random = np.random.default_rng(0)

    def move(p: jax.Array) -> jax.Array:
        signs = random.choice([-1.0, 1.0], p.shape)
        return p + jnp.asarray(signs * 2.0**-23, p.dtype) * p

    return jax.tree.map(move, params)


def differences(losses: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """Absolute differences between each other run's losses and the first run's, `[updates]`."""
    (_, first), *others = losses.items()
    return {name: np.abs(np.subtract(values, first)) for name, values in others}


def table(losses: dict[str, list[float]]) -> str:
    """A row for each run but the first: the largest difference within the first `SPANS` updates."""
    updates = len(next(iter(losses.values())))
    spans = [n for n in SPANS if n < updates] + [updates]
    rows = [
        (name, *(f"{values[:n].max():.1e}" for n in spans))
        for name, values in differences(losses).items()
    ]
    return markdown.table(["largest difference of losses", *map(str, spans)], rows)
