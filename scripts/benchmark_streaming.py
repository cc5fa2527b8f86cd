"""Evaluation of a long text as one sequence: time per character, and memory.

Usage: python -m scripts.benchmark_streaming [--features=1000] [--characters=446184]

Compares LSTM and BN-LSTM, evaluated as by `experiments.main`, with the matrix-vector products alone
that every step needs; all take turns, in one run. Then the memory of reading a long text against
that of a text of 1,000 characters, each in a process of its own.
"""

import concurrent.futures
import multiprocessing
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import ptb
from experiments import evaluate, tasks, train
from experiments.benchmarking import timing
from experiments.config import MODEL_KINDS
from experiments.reporting.compare import LABELS
from experiments.runtime import cli, markdown, progress

SYMBOLS = 50
TIMED = 5000  # characters of a measurement
SHORT = 1000  # characters of the text that memory is compared with


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_integer("features", 1000, "Hidden units H.", lower_bound=1)
    flags.DEFINE_integer(
        "characters",
        446_184,
        "Length of the long text; that of Penn Treebank's test.",
        lower_bound=100,
    )
    flags.DEFINE_integer("rounds", 7, "Measurements of each.", lower_bound=1)


def reader(kind: str, features: int, characters: int) -> Callable[[], None]:
    """What evaluates a random text of so many characters with an untrained model."""
    config = ptb.get_config()
    config.model.kind, config.model.features = kind, features
    valid_size = config.segment_length * config.batch_size
    train_size = 2 * valid_size
    with tempfile.TemporaryDirectory() as folder:
        letters = np.random.default_rng(0).integers(ord("0"), ord("0") + SYMBOLS, train_size)
        text = "".join(map(chr, np.resize(letters, train_size + valid_size + characters)))
        config.dataset, config.text_file = "text", str(Path(folder) / "text.txt")
        Path(config.text_file).write_text(text)
        config.split = (train_size, valid_size, characters)
        task = tasks.load(config)
    variables = train.variables_of(train.create_state(task, config))
    run, reading = evaluate.make_evaluator(task, jax.random.key(0)), task.readings[-1]

    def read() -> None:
        run(variables, reading, "test", 1, use_running_average=True)

    return read


def products(features: int, characters: int) -> Callable[[], None]:
    """What does the products of so many steps: `[1, H] x [H, 4H]`, and `[1, H] x [H, symbols]`."""
    recurrent = jax.random.normal(jax.random.key(0), (features, 4 * features)) / features
    readout = jax.random.normal(jax.random.key(1), (features, SYMBOLS))

    @jax.jit
    def multiply(h: jax.Array, recurrent: jax.Array, readout: jax.Array) -> jax.Array:
        def step(h: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            h = (h @ recurrent)[:, :features]
            return h, h

        _, hidden = jax.lax.scan(step, h, length=characters)
        return hidden @ readout

    h = jnp.ones((1, features))
    return lambda: jax.block_until_ready(multiply(h, recurrent, readout))


def peak_memory(kind: str, features: int, characters: int) -> float:
    """The most memory, in MiB, that this process held, with the text read once."""
    reader(kind, features, characters)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main(_: list[str]) -> None:
    """Measures and prints two tables."""
    features, rounds = flags.FLAGS.features, flags.FLAGS.rounds
    candidates = {"products alone": products(features, TIMED)}
    candidates |= {LABELS[kind]: reader(kind, features, TIMED) for kind in MODEL_KINDS}
    seconds = timing.measure(candidates, "measuring time", rounds)
    floor = statistics.median(seconds["products alone"])
    rows = [
        (name, *timing.spread(times, TIMED * 1e-6), f"{statistics.median(times) / floor:.2f}")
        for name, times in seconds.items()
    ]
    device = jax.devices()[0].device_kind
    print(f"{features} units, batch of one, float32, on {device}; {rounds} rounds\n")
    header = ["evaluation of a text", "us per character, median", "spread", "to products"]
    print(markdown.table(header, rows))

    lengths = (SHORT, flags.FLAGS.characters)
    rows = []
    for kind in MODEL_KINDS:
        label = LABELS[kind]
        # A process each, as the peak of one is for good.
        peaks = []
        for length in progress.track(lengths, f"measuring memory, {label}", len(lengths)):
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
                peaks.append(process.submit(peak_memory, kind, features, length).result())
        rows.append((label, *(f"{peak:.0f}" for peak in peaks), f"{peaks[1] / peaks[0]:.3f}"))
    header = ["peak memory of the process, MiB", *(f"{n:,} characters" for n in lengths), "ratio"]
    print(f"\n{markdown.table(header, rows)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
