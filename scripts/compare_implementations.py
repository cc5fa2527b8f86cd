"""Trains one model by several implementations side by side, and says how far apart they get.

    python -m scripts.compare_implementations --config=configs/pmnist.py --updates=500

Same seed, same batches: the default implementation, the plain scan that is its reference, the
default with operands in bfloat16, and the one kernel for the device at hand, if there is one. What
rounding alone does is shown by another: the reference from initial parameters of which each is
moved by one rounding, 2^-23 of it. Two implementations that differ by rounding only stay as close
as the reference and that one. Prints a table, and writes the losses and a picture of them.
"""

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
from experiments import errors, metrics, tasks, train, workdir
from experiments.errors import UserError
from scripts import pictures, timing

SPANS = (10, 50, 100, 200, 500, 1000)  # updates up to which the table tells differences


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; only here are flags defined, so that importing this defines none."""
    config_flags.DEFINE_config_file("config", "configs/pmnist.py", "Config file.")
    flags.DEFINE_integer("updates", 500, "Updates of each.", lower_bound=1)
    flags.DEFINE_string("output", "implementations.json", "File for losses; the picture is beside.")
    return flags.FLAGS(argv)


def runs() -> dict[str, tuple[dict[str, str], bool]]:
    """By name: what of the config is changed, and whether initial parameters are."""
    there = [name for name in available() if name != "reference"]
    plain = {"implementation": "reference", "dtype": "float32"}
    return {
        "reference": (plain, False),
        "reference, parameters moved by a rounding": (plain, True),
        **{name: ({"implementation": name, "dtype": "float32"}, False) for name in there},
        "xla, bfloat16": ({"implementation": "xla", "dtype": "bfloat16"}, False),
    }


def moved(params: Any) -> Any:
    """Parameters `[...]` of which each is moved by about one rounding, up or down."""
    random = np.random.default_rng(0)

    def move(p: jax.Array) -> jax.Array:
        signs = random.choice([-1.0, 1.0], p.shape)
        return p + jnp.asarray(signs * 2.0**-23, p.dtype) * p

    return jax.tree.map(move, params)


def losses(base: ConfigDict, updates: int) -> dict[str, list[float]]:
    """The training loss of every batch, in nats, by run; all take turns."""
    todo = runs()
    states, steps, found = {}, {}, {name: [] for name in todo}
    for name, (fields, is_moved) in todo.items():
        config = base.copy_and_resolve_references()
        config.model.update(fields)
        task = tasks.load(config)
        state = train.create_state(task, config)
        states[name] = state.replace(params=moved(state.params)) if is_moved else state
        steps[name] = train.make_train_step(task, train.random_keys(config.seed)[1])
    for update in metrics.track(range(updates), "training", updates):
        batch = task.train_batch(update)  # the same for every task
        for name, step in steps.items():
            state = step(states[name], batch)
            total, count = state.window["loss"]
            found[name].append(float(total / count))
            window = jax.tree.map(jnp.zeros_like, state.window)
            states[name] = state.replace(window=window)
    return found


def differences(found: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """Of every run but the reference: how far its losses are from it, `[updates]`."""
    (_, reference), *others = found.items()
    return {name: np.abs(np.subtract(values, reference)) for name, values in others}


def table(found: dict[str, list[float]]) -> str:
    """The largest difference of losses up to some updates, a line for each run."""
    updates = len(next(iter(found.values())))
    spans = [n for n in SPANS if n < updates] + [updates]
    rows = [
        (name, *(f"{values[:n].max():.1e}" for n in spans))
        for name, values in differences(found).items()
    ]
    return metrics.markdown_table(["largest difference of losses", *map(str, spans)], rows)


def draw(found: dict[str, list[float]], title: str) -> Any:
    """A figure of losses, and of their differences from the reference's."""
    figure = pictures.new_figure(title, 9, 4.2)
    left, right = figure.subplots(1, 2, sharex=True)
    colors = ("tab:gray", "tab:green", "tab:blue", "tab:orange", "tab:red")
    widths = (2.5, 1, 1, 1, 1)
    apart = differences(found)
    for (name, values), color, width in zip(found.items(), colors, widths, strict=False):
        updates = np.arange(1, len(values) + 1)
        left.plot(updates, values, color=color, linewidth=width, label=name)
        if name in apart:
            positive = np.maximum(apart[name], 1e-9)  # a logarithm needs some
            right.plot(updates, positive, color=color, linewidth=0.8, label=name)
    left.set(xlabel="update", ylabel="training loss of the batch (nats)")
    right.set(xlabel="update", ylabel="difference from the reference", yscale="log")
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
    timing.check_output(output)
    found = losses(given.config, given.updates)
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    title = f"{file}, {given.config.model.kind}, seed {given.config.seed}"
    print(f"{title}\n\n{table(found)}\n")
    record = timing.circumstances(jax.devices()[0]) | {"config": title, "losses": found}
    workdir.write_json(output, record)
    picture = output.with_suffix(".png")
    pictures.save(draw(found, title), picture)
    print(f"Losses: {output}\nPicture: {picture}")


if __name__ == "__main__":
    errors.run(main, parse_flags)
