"""Trains one model by several implementations side by side, and says how far apart they get.

    python -m scripts.compare_implementations --config=configs/pmnist.py --updates=500
    python -m scripts.compare_implementations --implementations=xla,gpu --bfloat16= --minutes=3

Same seed, same batches, in turn: each implementation named, and each of `--bfloat16` with operands
in bfloat16. Losses are compared with those of the first, by default the plain scan. What rounding
alone does is shown by another run of the first, from initial parameters of which each is moved by
one rounding, 2^-23 of it. Two implementations that differ by rounding only stay as close as these
two. Prints a table, and writes the losses and a picture of them.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from bnlstm_jax.recurrence import available
from experiments import config as configs
from experiments import tasks, train
from experiments.benchmarking import timing
from experiments.reporting import pictures
from experiments.runtime import cli, files, markdown, paths, progress
from experiments.runtime.errors import UserError

SPANS = (10, 50, 100, 200, 500, 1000)  # updates up to which the table tells differences


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", "configs/pmnist.py", "Config file.")
    flags.DEFINE_integer("updates", 500, "Updates of each, at most.", lower_bound=1)
    flags.DEFINE_float("minutes", None, "Ends earlier, after so long.", lower_bound=0)
    flags.DEFINE_list("implementations", None, "By default all for this device.")
    flags.DEFINE_list("bfloat16", ["xla"], "Implementations to run with such operands too.")
    paths.DEFINE_path("output", "implementations.json", "File for losses; the picture is beside.")


def named_runs(
    implementations: Sequence[str], in_bfloat16: Sequence[str]
) -> dict[str, tuple[dict[str, str], bool]]:
    """By name: what of the config is changed, and whether initial parameters are."""
    found = {
        name: ({"implementation": name, "dtype": "float32"}, False) for name in implementations
    }
    (first, (fields, _)), *others = found.items()
    return {
        first: (fields, False),
        f"{first}, parameters moved by a rounding": (fields, True),
        **dict(others),
        **{
            f"{name}, bfloat16": ({"implementation": name, "dtype": "bfloat16"}, False)
            for name in in_bfloat16
        },
    }


def moved(params: Any) -> Any:
    """Parameters `[...]` of which each is moved by about one rounding, up or down."""
    random = np.random.default_rng(0)

    def move(p: jax.Array) -> jax.Array:
        signs = random.choice([-1.0, 1.0], p.shape)
        return p + jnp.asarray(signs * 2.0**-23, p.dtype) * p

    return jax.tree.map(move, params)


class Comparison:
    """Runs that train side by side.

    Attributes:
      losses: the training loss of every batch so far, in nats, by run.
    """

    def __init__(self, base: ConfigDict, runs: dict[str, tuple[dict[str, str], bool]]) -> None:
        self.losses: dict[str, list[float]] = {name: [] for name in runs}
        self._states, self._steps = {}, {}
        for name, (fields, is_moved) in runs.items():
            config = base.copy_and_resolve_references()
            config.model.update(fields)
            self._task = tasks.load(config)  # every run's has the same batches
            state = train.create_state(self._task, config)
            self._states[name] = state.replace(params=moved(state.params)) if is_moved else state
            self._steps[name] = train.make_train_step(self._task, train.random_keys(config.seed)[1])

    def train(self, update: int) -> None:
        """One update of every run."""
        batch = self._task.train_batch(update)
        for name, step in self._steps.items():
            state = step(self._states[name], batch)
            total, count = state.window["loss"]
            self.losses[name].append(float(total / count))
            window = jax.tree.map(jnp.zeros_like, state.window)
            self._states[name] = state.replace(window=window)

    def train_for(self, updates: int, minutes: float | None) -> None:
        """Two updates, and as many more as `minutes` allow, to `updates` in all."""
        deadline = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
        for update in range(min(updates, 2)):
            start = time.monotonic()  # of the second: the first compiles
            self.train(update)
        now = time.monotonic()
        expected = min(updates, 2 + (deadline - now) / (now - start))
        for update in progress.track(range(2, updates), "training", max(int(expected) - 2, 1)):
            if time.monotonic() > deadline:
                break
            self.train(update)


def differences(found: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """Of every run but the first: how far its losses are from that one's, `[updates]`."""
    (_, first), *others = found.items()
    return {name: np.abs(np.subtract(values, first)) for name, values in others}


def table(found: dict[str, list[float]]) -> str:
    """The largest difference of losses up to some updates, a line for each run."""
    updates = len(next(iter(found.values())))
    spans = [n for n in SPANS if n < updates] + [updates]
    rows = [
        (name, *(f"{values[:n].max():.1e}" for n in spans))
        for name, values in differences(found).items()
    ]
    return markdown.table(["largest difference of losses", *map(str, spans)], rows)


def draw(found: dict[str, list[float]], title: str) -> Any:
    """A figure of losses, and of their differences from the first run's."""
    figure = pictures.new_figure(title, 9, 4.2)
    left, right = figure.subplots(1, 2, sharex=True)
    apart, first = differences(found), next(iter(found))
    for number, (name, values) in enumerate(found.items()):
        updates = np.arange(1, len(values) + 1)
        width = 2.5 if name == first else 1
        left.plot(updates, values, color=f"C{number}", linewidth=width, label=name)
        if name in apart:
            positive = np.maximum(apart[name], 1e-9)  # a logarithm needs some
            right.plot(updates, positive, color=f"C{number}", linewidth=0.8, label=name)
    left.set(xlabel="update", ylabel="training loss of the batch (nats)")
    right.set(xlabel="update", ylabel=f"difference from {first}", yscale="log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for axes in (left, right):
        pictures.tidy(axes)
    return figure


def main(_: list[str]) -> None:
    """Trains, prints the table, and writes losses and picture."""
    given = flags.FLAGS
    output = Path(given.output)
    configs.check(given.config)
    if len(configs.model_kinds(given.config)) > 1:
        raise UserError("--config.model.kind is to be one kind of model here")
    names = given.implementations or sorted(available(), key="reference".__ne__)
    timing.check_names("implementations", names, available())
    if given.bfloat16:
        timing.check_names("bfloat16", given.bfloat16, available())
    timing.check_output(output)
    runs = named_runs(names, given.bfloat16)
    comparison = Comparison(given.config, runs)
    comparison.train_for(given.updates, given.minutes)
    found = comparison.losses
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    title = f"{file}, {given.config.model.kind}, seed {given.config.seed}"
    print(f"{title}\n\n{table(found)}\n")
    record = timing.circumstances(jax.devices()[0]) | {"config": title, "losses": found}
    files.write_json(output, record)
    print(f"Losses: {output}")
    picture = output.with_suffix(".png")
    try:
        figure = draw(found, title)
    except UserError as error:  # the losses are what counts
        print(f"No picture: {error}")
        return
    pictures.save(figure, picture)
    print(f"Picture: {picture}")


if __name__ == "__main__":
    cli.run(main, define_flags)
