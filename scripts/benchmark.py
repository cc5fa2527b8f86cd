"""BN-LSTM against LSTM, Flax's and PyTorch's layers, and the matrix products that all of them need.

    python -m scripts.benchmark
    python -m scripts.benchmark --sizes=ptb --dtypes=float32 --passes=update --device=cpu

Layers have the sizes of the paper's experiments; inputs and parameters are random. A pass is a
training one: `forward` is the outputs by batch statistics and the new running averages, `update`
their mean square's gradient and a step of gradient descent besides. Dense inputs of several
features are taken for embeddings: an update differentiates by them and changes them too. Flax's and
PyTorch's own layers read symbols as one-hot vectors, which they are given.

All candidates for one size, dtype and pass take turns. Float32 products are as precise as JAX makes
them by default. Memory is what a pass needs beside its arguments: of JAX's programs, by XLA's own
account, temporary arrays and those results that do not take an argument's place; of PyTorch's, the
peak of a pass, on a GPU only. The file has the seconds of every round, and on what, with what and
when they were measured.
"""

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from bnlstm_jax import BNLSTM, LSTM
from bnlstm_jax.cells import product
from bnlstm_jax.jax_experimental import rnn
from bnlstm_jax.recurrence import IMPLEMENTATIONS, available
from bnlstm_jax.recurrence.devices import default_device
from bnlstm_jax.recurrence.native import cpu
from bnlstm_jax.recurrence.problem import transpose
from experiments.benchmarking import timing
from experiments.benchmarking.timing import Program
from experiments.runtime import cli, files, markdown, memory, paths, progress
from experiments.runtime.errors import UserError


class Size(NamedTuple):
    """A layer and a batch for it.

    `inputs` is the number of features of an input, or of symbols. A bidirectional layer reads
    sequences of different lengths, padded.
    """

    features: int
    batch: int
    steps: int
    inputs: int
    symbols: bool = False
    bidirectional: bool = False

    @property
    def embedded(self) -> bool:
        """Whether inputs are dense, of several features."""
        return self.inputs > 1 and not self.symbols


SIZES = {
    "pmnist": Size(100, 100, 784, inputs=1),
    "ptb": Size(1000, 64, 99, inputs=50, symbols=True),
    "reader": Size(240, 64, 300, inputs=240, bidirectional=True),
    "text8": Size(2000, 128, 179, inputs=27, symbols=True),
}
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
PASSES = ("update", "forward")
RATE = 1e-3  # of gradient descent
DEFAULT = f"BN-LSTM, {next(iter(IMPLEMENTATIONS))}"
FLOOR = "matrix products alone"
FLAGS = ("sizes", "dtypes", "passes", "device", "rounds", "small")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list("sizes", list(SIZES), f"Of {', '.join(SIZES)}.")
    flags.DEFINE_list("dtypes", list(DTYPES), f"Of products' operands: {', '.join(DTYPES)}.")
    flags.DEFINE_list("passes", list(PASSES), f"Of {', '.join(PASSES)}.")
    flags.DEFINE_list("implementations", None, "Of this project's; by default all for the device.")
    flags.DEFINE_enum("device", None, ["cpu", "gpu", "tpu"], "By default the one JAX chooses.")
    flags.DEFINE_integer("rounds", 7, "Measurements of each.", lower_bound=1)
    paths.DEFINE_path("output", "benchmark.json", "File for all that is measured.")
    flags.DEFINE_bool("small", False, "Tiny layers, for a quick look.")


def find_device(kind: str | None) -> jax.Device:
    """The first device of a kind, by default of the one that JAX chooses."""
    try:
        return jax.devices(kind)[0]
    except RuntimeError as error:
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise UserError(f"--device={kind}: JAX has no such device here, only {there}") from error


def peers_device(device: jax.Device) -> str | None:
    """PyTorch's name of a kind of device; None where it is not installed, or not for that."""
    try:
        import torch
    except ImportError:
        return None
    if device.platform == "gpu":
        return "cuda" if torch.cuda.is_available() else None
    return "cpu" if device.platform == "cpu" else None


def peak_of(device: jax.Device) -> float | None:
    """Float32 operations a second of a CPU; None for others, or where nothing can be compiled."""
    if device.platform != "cpu":
        return None
    try:
        return cpu.peak()
    except (RuntimeError, OSError):
        return None


def make_small(size: Size) -> Size:
    """A size that takes no time."""
    names = ("features", "batch", "steps", "inputs")
    most = (8, 4, 5, size.inputs if size.symbols else 8)
    return size._replace(**{n: min(getattr(size, n), m) for n, m in zip(names, most, strict=True)})


def make_batch(size: Size) -> tuple[np.ndarray, np.ndarray | None]:
    """Inputs `[B, T, D]`, or symbols `[B, T]`, and lengths `[B]` where they differ."""
    random = np.random.default_rng(0)
    if size.symbols:
        inputs = random.integers(size.inputs, size=(size.batch, size.steps), dtype=np.int32)
    else:
        inputs = random.normal(size=(size.batch, size.steps, size.inputs)).astype(np.float32)
    if not size.bidirectional:
        return inputs, None
    lengths = random.integers(size.steps // 2, size.steps + 1, size.batch)
    lengths[0] = size.steps
    return inputs, lengths


def compile_program(function: Callable, state: Any, given: Any, is_update: bool) -> Program:
    """A program of JAX, from `(state, given)` to results; an update's are the next one's state."""
    start = time.perf_counter()
    donated = (0,) if is_update else ()
    compiled = jax.jit(function, donate_argnums=donated).lower(state, given).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    def run() -> None:
        nonlocal state
        results = jax.block_until_ready(compiled(state, given))
        if is_update:
            state = results

    return Program(run, needed, seconds)


def training_pass(
    apply: Callable, learned: Any, batch_stats: Any, given: Any, is_update: bool
) -> Program:
    """The program of `apply(values, batch_stats)`, which gives outputs and new statistics.

    `values` are those of `learned` and `given`; an update changes the former.
    """

    def forward(state: tuple, given: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        learned, batch_stats = state
        return apply(learned | given, batch_stats)

    def update(state: tuple, given: dict[str, Any]) -> tuple:
        learned, batch_stats = state

        def loss(learned: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
            y, new_stats = forward((learned, batch_stats), given)
            return jnp.mean(jnp.square(y.astype(jnp.float32))), new_stats

        gradient, new_stats = jax.grad(loss, has_aux=True)(learned)
        return jax.tree.map(lambda p, g: p - RATE * g, learned, gradient), new_stats

    function = update if is_update else forward
    return compile_program(function, (learned, batch_stats), given, is_update)


def layer(
    make: Callable[[], nn.Module], size: Size, is_update: bool, one_hot: bool = False
) -> Program:
    """A training pass of a Flax layer, or of one for each direction."""
    given = batch_arrays(size, one_hot)
    model = nn.Bidirectional(make(), make()) if size.bidirectional else make()
    shapes = jax.eval_shape(model.init, jax.random.key(0), given["inputs"])
    random, scale = np.random.default_rng(1), size.features**-0.5
    batch_stats = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, scale, leaf.shape), leaf.dtype), shapes
    )
    learned = {"params": batch_stats.pop("params")}
    if size.embedded:
        learned["inputs"] = given.pop("inputs")

    def apply(values: dict[str, Any], batch_stats: dict[str, Any]) -> tuple[Array, dict]:
        return model.apply(
            {"params": values["params"], **batch_stats},
            values["inputs"],
            seq_lengths=values["seq_lengths"],
            mutable=["batch_stats"],
        )

    return training_pass(apply, learned, batch_stats, given, is_update)


def batch_arrays(size: Size, one_hot: bool) -> dict[str, Array | None]:
    """A batch on the device, its symbols as one-hot vectors if asked for."""
    inputs, lengths = make_batch(size)
    if one_hot and size.symbols:
        inputs = np.eye(size.inputs, dtype=np.float32)[inputs]
    return jax.tree.map(jnp.asarray, {"inputs": inputs, "seq_lengths": lengths})


def cudnn_lstm(size: Size, is_update: bool) -> Program:
    """A training pass of cuDNN's LSTM, which JAX has for NVIDIA GPUs, in float32."""
    given = batch_arrays(size, one_hot=True)
    features = given["inputs"].shape[-1]
    shape = (features, size.features, 1, size.bidirectional)
    learned = {"weights": rnn.init_lstm_weight(jax.random.key(0), *shape)}
    if size.embedded:
        learned["inputs"] = given.pop("inputs")
    if given["seq_lengths"] is None:
        given["seq_lengths"] = jnp.full(size.batch, size.steps)
    given["seq_lengths"] = given["seq_lengths"].astype(jnp.int32)
    state = jnp.zeros((1 + size.bidirectional, size.batch, size.features))

    def apply(values: dict[str, Any], batch_stats: dict[str, Any]) -> tuple[Array, dict]:
        inputs, weights = values["inputs"], values["weights"]
        y, *_ = rnn.lstm(
            inputs, state, state, weights, values["seq_lengths"], *shape[:3], 0.0, shape[3]
        )
        return y, batch_stats

    return training_pass(apply, learned, {}, given, is_update)


def products(size: Size, dtype: Any, is_update: bool) -> Program:
    """The matrix products of a pass of an LSTM, normalised or not, and next to nothing besides."""
    dtype = dtype or jnp.float32
    units, gates = size.features, 4 * size.features
    key = jax.random.key(0)

    def draw(*shape: int) -> Array:
        return jax.random.normal(key, shape)

    def multiply(x: Array, y: Array) -> Array:
        return product(x, y, dtype)

    def forward(given: dict[str, Array]) -> list[Array]:
        """Hidden states of all steps, and the input term."""
        kernel = given["recurrent_kernel"].astype(dtype)

        def step(h: Array, _: None) -> tuple[Array, Array]:
            h = sum(jnp.split(multiply(h, kernel), 4, -1))  # needs all of it
            return h, h

        _, hidden = jax.lax.scan(step, given["h"], length=size.steps)
        return [hidden, *([multiply(given["x"], given["input_kernel"])] if size.embedded else [])]

    def backward(given: dict[str, Array], hidden: Array) -> list[Array]:
        """Products of the shapes that gradients of hidden states, kernels and inputs take."""
        transposed = transpose(given["recurrent_kernel"].astype(dtype))

        def step(h: Array, _: None) -> tuple[Array, Array]:
            d = jnp.concatenate([h] * 4, -1)
            return multiply(d, transposed), d

        h, d = jax.lax.scan(step, hidden[-1], length=size.steps)
        d = d.reshape(-1, gates)
        found = [h, multiply(transpose(hidden.reshape(-1, units).astype(dtype)), d)]
        if size.embedded:
            x, kernel = given["x"].astype(dtype), given["input_kernel"].astype(dtype)
            x = x.reshape(-1, size.inputs)
            found += [multiply(transpose(x), d), multiply(d, transpose(kernel))]
        return found

    def run(_: None, directions: list[dict[str, Array]]) -> list[list[Array]]:
        results = [forward(given) for given in directions]
        if is_update:
            results += [backward(g, r[0]) for g, r in zip(directions, results, strict=True)]
        return results

    given = {
        "h": draw(size.batch, units),
        "recurrent_kernel": draw(units, gates) / gates**0.5,  # hidden states keep their size
    }
    if size.embedded:
        given["x"] = draw(size.steps, size.batch, size.inputs)
        given["input_kernel"] = draw(size.inputs, gates)
    # A second direction is arguments of its own, so that XLA shares nothing between the two.
    return compile_program(run, None, [given] * (1 + size.bidirectional), False)


def candidates(
    size: Size, dtype: str, is_update: bool, implementations: Sequence[str], peers: str | None
) -> dict[str, Program]:
    """All that is compared, by name; with `peers`, PyTorch's layers on that device.

    Those that cannot be made or run, but for the default ones, are left out with a line.
    """
    units, kind = size.features, DTYPES[dtype]
    vocab_size = size.inputs if size.symbols else None
    fields = {"vocab_size": vocab_size, "dtype": kind}
    normalized = {"max_steps": size.steps, "use_running_average": False}
    makers = {FLOOR: functools.partial(products, size, kind, is_update)}
    may_fail = []  # candidates that do not run everything
    for label, kind_of_layer, more in (("BN-LSTM", BNLSTM, normalized), ("LSTM", LSTM, {})):
        for name in implementations:
            own = functools.partial(kind_of_layer, units, implementation=name, **fields, **more)
            makers[f"{label}, {name}"] = functools.partial(layer, own, size, is_update)
            if name != "xla":
                may_fail.append(f"{label}, {name}")

    def flax_rnn() -> nn.Module:
        return nn.RNN(nn.OptimizedLSTMCell(units, dtype=kind))

    makers["Flax OptimizedLSTMCell"] = functools.partial(
        layer, flax_rnn, size, is_update, one_hot=True
    )
    if default_device().platform == "gpu" and kind is None:
        makers["cuDNN LSTM"] = functools.partial(cudnn_lstm, size, is_update)
        may_fail.append("cuDNN LSTM")
    tracked = progress.track(makers.items(), "compiling", len(makers))
    made = {}
    for name, make in tracked:
        try:
            program = make()
            if name in may_fail:
                program.run()
            made[name] = program
        except (ValueError, RuntimeError) as error:  # not supported, not compiled, or not run
            if name not in may_fail:
                raise
            print(f"{name}: {error}")
    if peers is not None:
        from experiments.benchmarking import torch_peers

        autocast = peers == "cuda" and kind is not None  # on a CPU it is slow
        rate = RATE if is_update else None
        given = units, *make_batch(size), vocab_size, rate, peers, autocast
        try:
            for name, program in torch_peers.programs(*given).items():
                program.run()
                made[name] = program
        except RuntimeError as error:  # out of memory, say
            print(f"PyTorch: {error}")
    return made


def measure(programs: dict[str, Program], title: str, rounds: int) -> dict[str, dict[str, Any]]:
    """What the file has of each program: times of runs in turn, memory, time of compiling."""
    seconds = timing.measure({name: p.run for name, p in programs.items()}, title, rounds)
    return {
        name: {
            "seconds": seconds[name],
            "median": statistics.median(seconds[name]),
            "memory_bytes": program.memory,
            "compile_seconds": program.compile_seconds,
        }
        for name, program in programs.items()
    }


def operations(size: Size, is_update: bool) -> int:
    """Floating-point operations of the products that a pass of an LSTM needs.

    An update has two more of the size of each forward one: for what it multiplies, and its kernel.
    """
    rows = size.features + (size.inputs if size.embedded else 0)
    forward = 2 * size.steps * size.batch * rows * 4 * size.features
    return forward * (3 if is_update else 1) * (1 + size.bidirectional)


def table(measured: dict[str, dict[str, Any]], steps: int, least: float | None) -> str:
    """The results of one size, dtype and pass. At the processor's peak it takes `least` seconds."""
    own, floor = measured[DEFAULT]["median"], measured[FLOOR]["median"]
    rows = []
    for name, found in measured.items():
        median, memory, compiling = (
            found[key] for key in ("median", "memory_bytes", "compile_seconds")
        )
        rows.append(
            (
                name,
                *timing.spread(found["seconds"]),
                f"{1e6 * median / steps:.1f}",
                f"{median / own:.2f}",
                f"{floor / median:.0%}",
                "-" if least is None else f"{least / median:.0%}",
                "-" if memory is None else f"{memory / 1e6:.1f}",
                "-" if compiling is None else f"{compiling:.1f}",
            )
        )
    header = ["candidate", "ms per pass", "spread", "us per time step", f"to {DEFAULT}"]
    header += ["products' share", "of the peak", "memory MB", "compile s"]
    return markdown.table(header, rows)


def main(_: list[str]) -> None:
    """Prints a table for each pass, size and dtype; writes the file after each."""
    given = flags.FLAGS
    for flag, known in (("sizes", SIZES), ("dtypes", DTYPES), ("passes", PASSES)):
        timing.check_names(flag, getattr(given, flag), known)
    output = Path(given.output)
    timing.check_output(output)
    memory.keep_freed()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch of the GPU
    jax.config.update("jax_enable_compilation_cache", False)  # for times of compiling
    device = find_device(given.device)
    with jax.default_device(device):
        there = available()
    implementations = given.implementations or there
    timing.check_names("implementations", implementations, there)
    if "xla" not in implementations:
        raise UserError("--implementations has to have xla, which all is compared with")
    peers = peers_device(device)
    if peers is None:
        print("PyTorch is not installed, or not for this device: its layers are left out.\n")
    record = timing.circumstances(device) | {
        "flags": {name: getattr(given, name) for name in FLAGS}
    }
    record |= {"peak_flops": peak_of(device), "results": []}
    if record["peak_flops"]:
        peak = record["peak_flops"] / 1e9
        print(f"Peak in float32, {cpu.instruction_set()}, of all threads: {peak:.0f} GFLOP/s.\n")
    sizes = {name: make_small(SIZES[name]) if given.small else SIZES[name] for name in given.sizes}
    record["sizes"] = {name: size._asdict() for name, size in sizes.items()}
    for kind, name, dtype in itertools.product(given.passes, sizes, given.dtypes):
        size, title = sizes[name], f"{name}, {dtype}, {kind}"
        with jax.default_device(device):
            programs = candidates(size, dtype, kind == "update", implementations, peers)
            measured = measure(programs, f"measuring {title}", given.rounds)
        del programs  # and with them their arrays
        least = None
        if record["peak_flops"] and dtype == "float32":
            least = operations(size, kind == "update") / record["peak_flops"]
        shown = table(measured, size.steps, least)
        print(
            f"{title}: {size.features} units, batch {size.batch}, {size.steps} steps, on "
            f"{device.device_kind}; {given.rounds} rounds\n\n{shown}\n",
            flush=True,
        )
        result = {"size": name, "dtype": dtype, "pass": kind, "candidates": measured}
        record["results"].append(result)
        files.write_json(output, record)
    print(f"All that was measured: {output}")


if __name__ == "__main__":
    cli.run(main, define_flags)
