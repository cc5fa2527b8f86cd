"""Training speed of the five readers at the paper's size, and where an update's time goes.

Usage: python -m scripts.benchmark_reader [--features=240] [--words=65830] [--length=300]

Questions are made up: random words, passages all of one length. Every reader takes an update in
turn, so that what else the machine does falls on all. Then the parts of an update, each a program
of its own: its forward pass and its gradient, on arrays of the sizes that it has in the whole.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from bnlstm_jax.cells import look_up
from bnlstm_jax.initializers import orthogonal_blocks
from configs import cnn_qa
from experiments import tasks, train
from experiments.benchmarking import timing
from experiments.config import READER_KINDS
from experiments.datasets import prepared
from experiments.datasets.question_arrays import SPLITS, Question, pack
from experiments.datasets.questions import SPECIALS
from experiments.models.attentive_reader import AttentiveReader, Encoder
from experiments.models.readout import Readout
from experiments.reporting.compare import LABELS
from experiments.runtime import cli, markdown


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_integer("features", 240, "Hidden units of a direction.", lower_bound=1)
    flags.DEFINE_integer("words", 65_830, "Size of the vocabulary.", lower_bound=10)
    flags.DEFINE_integer("length", 300, "Words of a passage, padding included.", lower_bound=8)
    flags.DEFINE_integer("question_length", 16, "Words of a question.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 64, "Questions of a batch.", lower_bound=2)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of products' operands.")
    flags.DEFINE_integer("rounds", 7, "Measurements of each.", lower_bound=1)


def make_config(data_dir: Path) -> ConfigDict:
    """The config of four sentences, on made-up questions that it prepares in `data_dir`."""
    given, random = flags.FLAGS, np.random.default_rng(0)
    words = [f"@entity{i}" for i in range(500)] + [f"w{i}" for i in range(given.words)]
    words = words[: given.words - len(SPECIALS)]
    number = max(given.batch_size, -(-len(words) // (given.length - 1)))  # to hold every word
    text = np.resize(random.permutation(words), number * (given.length - 1))

    def question(passage: np.ndarray) -> Question:
        asked = random.choice(passage, given.question_length - 1)
        return Question("", passage.tolist(), asked.tolist(), str(passage[0]), [])

    made = [question(passage) for passage in text.reshape(number, -1)]
    arrays = pack(dict.fromkeys(SPLITS, made))
    info = {"complete": False, "skipped": {}}
    prepared.write(data_dir / "prepared" / "cnn", arrays, info, {})
    config = cnn_qa.get_config("four_sentences")
    config.data_dir = str(data_dir)
    config.num_sentences = 0
    config.min_count = 1
    config.batch_size = given.batch_size
    config.model.features = given.features
    config.model.dtype = given.dtype
    return config


def parts(task: tasks.Task, state: train.TrainState, batch: tasks.Batch) -> dict[str, Callable]:
    """The parts of an update, each a compiled program."""
    given = flags.FLAGS
    reader: AttentiveReader = task.model
    key = jax.random.key(0)
    embedding = state.params["embedding"]
    layer = reader.recurrent_layer(orthogonal_blocks(), given.length)
    encoder = Encoder(layer, reader.bidirectional)
    readout = Readout(reader.vocab_size, reader.dtype)
    embedded = look_up(batch["passage"], embedding)
    inputs = [embedded] * (1 + reader.bidirectional)
    lengths = batch["passage_length"]
    encoder_variables = encoder.init(key, inputs, lengths, True)
    g = jax.random.normal(key, (given.batch_size, given.features))

    def look_up_all(embedding: jax.Array) -> jax.Array:
        found = [look_up(batch[name], embedding, reader.dtype) for name in ("passage", "question")]
        return sum(jnp.sum(x * x) for x in found)

    def encode(params: Any, inputs: Any) -> jax.Array:
        (y, u), _ = encoder.apply(
            {**encoder_variables, "params": params}, inputs, lengths, False, mutable=["batch_stats"]
        )
        return jnp.sum(y * y) + jnp.sum(u * u)

    def answer(params: Any, g: jax.Array) -> jax.Array:
        total, count = task.metrics(readout.apply({"params": params}, g), batch)["loss"]
        return total / count

    def update(params: Any, opt_state: Any) -> Any:
        updates, opt_state = state.tx.update(params, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state

    programs = {
        f"embedding, {reader.vocab_size:,} words": (jax.grad(look_up_all), (embedding,)),
        "encoder of the passage": (
            jax.grad(encode, argnums=(0, 1)),
            (encoder_variables["params"], inputs),
        ),
        f"output layer and softmax, {reader.vocab_size:,} words": (
            jax.grad(answer, argnums=(0, 1)),
            (state.params["readout"], g),
        ),
        "clipping and Adam": (update, (state.params, state.opt_state)),
    }
    return {
        name: functools.partial(run, jax.jit(function), arguments)
        for name, (function, arguments) in programs.items()
    }


def run(program: Callable, arguments: tuple[Any, ...]) -> None:
    """Runs a program to its end."""
    jax.block_until_ready(program(*arguments))


def main(_: list[str]) -> None:
    """Measures and prints two tables."""
    given = flags.FLAGS
    states, loaded = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder))
        for kind in READER_KINDS:
            own = config.copy_and_resolve_references()
            own.model.kind = kind
            loaded[kind] = tasks.load(own)
            states[kind] = train.create_state(loaded[kind], own)
    batch = jax.device_put(loaded["lstm"].train_batch(0))

    def updater(kind: str) -> Callable[[], None]:
        step = train.make_train_step(loaded[kind], jax.random.key(0))

        def update() -> None:
            states[kind] = jax.block_until_ready(step(states[kind], batch))

        return update

    updates = {kind: updater(kind) for kind in READER_KINDS}
    seconds = timing.measure(updates, "measuring updates", given.rounds)
    device = jax.devices()[0].device_kind
    print(
        f"{given.features} units, {given.words:,} words, {given.batch_size} passages of "
        f"{batch['passage'].shape[1]} words, {given.dtype}, on {device}; {given.rounds} rounds\n"
    )
    plain = statistics.median(seconds["lstm"])
    rows = [
        (
            LABELS[kind],
            f"{sum(leaf.size for leaf in jax.tree.leaves(states[kind].params)):,}",
            *timing.spread(times),
            f"{given.batch_size / statistics.median(times):.1f}",
            f"{statistics.median(times) / plain:.2f}",
        )
        for kind, times in seconds.items()
    ]
    header = ["reader", "parameters", "ms per update", "spread", "questions per s", "to LSTM"]
    print(markdown.table(header, rows))

    for kind in ("lstm", "bn_e_star_star"):
        whole = statistics.median(seconds[kind])
        measured = timing.measure(
            parts(loaded[kind], states[kind], batch), f"measuring {LABELS[kind]}", given.rounds
        )
        rows = [
            (name, *timing.spread(times), f"{statistics.median(times) / whole:.1%}")
            for name, times in measured.items()
        ]
        header = [f"part of an update, {LABELS[kind]}", "ms", "spread", "of the whole"]
        print(f"\n{markdown.table(header, rows)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
