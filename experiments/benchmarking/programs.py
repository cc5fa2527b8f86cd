"""The programs that a benchmark compares: passes of layers, and the matrix products they need.

A `forward` pass computes outputs with batch statistics, and new running averages. An `update` adds
the gradient of the outputs' mean square, and a step of gradient descent. Dense inputs of several
features stand for embeddings, which an update changes too. The LSTMs of Flax, cuDNN and PyTorch get
symbols as one-hot vectors.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlstm_jax import BNLSTM, LSTM
from bnlstm_jax.cells import product
from bnlstm_jax.recurrence.devices import default_device
from bnlstm_jax.recurrence.problem import transpose
from experiments.benchmarking.timing import Program
from experiments.jax_experimental import rnn
from experiments.runtime import progress

RATE = 1e-3  # of gradient descent
DEFAULT = "BN-LSTM, xla"  # others are compared with it
PRODUCTS = "matrix products alone"
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
PASSES = ("update", "forward")


class Size(NamedTuple):
    """A layer and its batch.

    Attributes:
      features: hidden units H.
      batch, steps: sequences B and time steps T.
      inputs: features of an input, or the number of symbols.
      symbols: inputs are symbols.
      bidirectional: a layer for each direction; sequences differ in length and are padded.
    """

    features: int
    batch: int
    steps: int
    inputs: int
    symbols: bool = False
    bidirectional: bool = False

    @property
    def embedded(self) -> bool:
        """Whether inputs are dense, with several features."""
        return self.inputs > 1 and not self.symbols

    def small(self) -> "Size":
        """The same kind of layer with few units and steps."""
        inputs = self.inputs if self.symbols else min(self.inputs, 8)
        return self._replace(features=8, batch=4, steps=5, inputs=inputs)


SIZES = {
    "pmnist": Size(100, 100, 784, inputs=1),
    "ptb": Size(1000, 64, 99, inputs=50, symbols=True),
    "reader": Size(240, 64, 300, inputs=240, bidirectional=True),
    "text8": Size(2000, 128, 179, inputs=27, symbols=True),
}


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


# ---- JAX's programs.


def compile_program(function: Callable, state: Any, given: Any, is_update: bool) -> Program:
    """Compiles `function(state, given)`; the results of an update are the next run's state."""
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
    """Compiles a pass of `apply(values, batch_stats)`, which returns outputs and new statistics.

    `values` has the entries of `learned`, which an update changes, and of `given`.
    """

    def forward(state: tuple, given: dict[str, Any]) -> tuple[Array, Any]:
        learned, batch_stats = state
        return apply(learned | given, batch_stats)

    def update(state: tuple, given: dict[str, Any]) -> tuple:
        learned, batch_stats = state

        def loss(learned: dict[str, Any]) -> tuple[Array, Any]:
            y, new_stats = forward((learned, batch_stats), given)
            return jnp.mean(jnp.square(y.astype(jnp.float32))), new_stats

        gradient, new_stats = jax.grad(loss, has_aux=True)(learned)
        return jax.tree.map(lambda p, g: p - RATE * g, learned, gradient), new_stats

    function = update if is_update else forward
    return compile_program(function, (learned, batch_stats), given, is_update)


def batch_arrays(size: Size, one_hot: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch on the device: the entries that an update learns, and the others."""
    inputs, lengths = make_batch(size)
    if one_hot and size.symbols:
        inputs = np.eye(size.inputs, dtype=np.float32)[inputs]
    inputs, lengths = jax.tree.map(jnp.asarray, (inputs, lengths))
    if size.embedded:
        return {"inputs": inputs}, {"seq_lengths": lengths}
    return {}, {"inputs": inputs, "seq_lengths": lengths}


def layer(
    make: Callable[[], nn.Module], size: Size, is_update: bool, one_hot: bool = False
) -> Program:
    """A pass of a Flax layer, or of one for each direction."""
    learned, given = batch_arrays(size, one_hot)
    model = nn.Bidirectional(make(), make()) if size.bidirectional else make()
    shapes = jax.eval_shape(model.init, jax.random.key(0), (learned | given)["inputs"])
    random, scale = np.random.default_rng(1), size.features**-0.5
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, scale, leaf.shape), leaf.dtype), shapes
    )
    learned["params"] = variables.pop("params")

    def apply(values: dict[str, Any], batch_stats: dict[str, Any]) -> tuple[Array, dict]:
        return model.apply(
            {"params": values["params"], **batch_stats},
            values["inputs"],
            seq_lengths=values["seq_lengths"],
            mutable=["batch_stats"],
        )

    return training_pass(apply, learned, variables, given, is_update)


def flax_lstm(size: Size, dtype: Any, is_update: bool) -> Program:
    """A pass of Flax's LSTM."""
    return layer(
        lambda: nn.RNN(nn.OptimizedLSTMCell(size.features, dtype=dtype)), size, is_update, True
    )


def cudnn_lstm(size: Size, is_update: bool) -> Program:
    """A pass of cuDNN's LSTM, which JAX has for NVIDIA GPUs, in float32."""
    learned, given = batch_arrays(size, one_hot=True)
    shape = (size.inputs, size.features, 1, size.bidirectional)
    learned["weights"] = rnn.init_lstm_weight(jax.random.key(0), *shape)
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


# ---- The products alone.


def products(size: Size, dtype: Any, is_update: bool) -> Program:
    """The matrix products of a pass of an LSTM, and almost nothing else."""
    key, units, gates = jax.random.key(0), size.features, 4 * size.features
    given = {
        "h": jax.random.normal(key, (size.batch, units)),
        # Scaled so that hidden states keep their size.
        "recurrent_kernel": jax.random.normal(key, (units, gates)) / gates**0.5,
    }
    if size.embedded:
        given["x"] = jax.random.normal(key, (size.steps, size.batch, size.inputs))
        given["input_kernel"] = jax.random.normal(key, (size.inputs, gates))
    dtype = dtype or jnp.float32

    def run(_: None, directions: list[dict[str, Array]]) -> list[list[Array]]:
        results = [forward_products(given, size.steps, dtype) for given in directions]
        if is_update:
            results += [
                backward_products(given, found[0], dtype)
                for given, found in zip(directions, results, strict=True)
            ]
        return results

    # Each direction has its own arguments, so that XLA shares nothing between the two.
    return compile_program(run, None, [given] * (1 + size.bidirectional), False)


def forward_products(given: dict[str, Array], steps: int, dtype: Any) -> list[Array]:
    """Hidden states of all steps `[T, B, H]`, and for dense inputs the input term `[T, B, 4H]`."""
    kernel = given["recurrent_kernel"].astype(dtype)

    def step(h: Array, _: None) -> tuple[Array, Array]:
        h = sum(jnp.split(product(h, kernel, dtype), 4, -1))  # needs the whole product
        return h, h

    _, hidden = jax.lax.scan(step, given["h"], length=steps)
    if "x" not in given:
        return [hidden]
    return [hidden, product(given["x"], given["input_kernel"], dtype)]


def backward_products(given: dict[str, Array], hidden: Array, dtype: Any) -> list[Array]:
    """Products of the same shapes as in the gradients of hidden states, kernels and inputs."""
    transposed = transpose(given["recurrent_kernel"].astype(dtype))

    def step(h: Array, _: None) -> tuple[Array, Array]:
        d = jnp.concatenate([h] * 4, -1)
        return product(d, transposed, dtype), d

    h, d = jax.lax.scan(step, hidden[-1], length=len(hidden))
    d = d.reshape(-1, d.shape[-1])
    rows = transpose(hidden.reshape(-1, hidden.shape[-1]).astype(dtype))
    found = [h, product(rows, d, dtype)]
    if "x" in given:
        x, kernel = given["x"].astype(dtype), given["input_kernel"].astype(dtype)
        x = transpose(x.reshape(-1, x.shape[-1]))
        found += [product(x, d, dtype), product(d, transpose(kernel), dtype)]
    return found


def operations(size: Size, is_update: bool) -> int:
    """Floating-point operations of these products.

    An update has two more products for each forward one: gradients of its two operands.
    """
    rows = size.features + (size.inputs if size.embedded else 0)
    forward = 2 * size.steps * size.batch * rows * 4 * size.features
    return forward * (3 if is_update else 1) * (1 + size.bidirectional)


# ---- All candidates.


def candidates(
    size: Size, dtype: str, is_update: bool, implementations: Sequence[str]
) -> dict[str, Callable[[], Program]]:
    """Functions that compile the candidates, by name; PyTorch's only if it is installed."""
    kind = DTYPES[dtype]
    fields = {"vocab_size": size.inputs if size.symbols else None, "dtype": kind}
    normalized = {"max_steps": size.steps, "use_running_average": False}
    makers = {PRODUCTS: functools.partial(products, size, kind, is_update)}
    for label, kind_of_layer, more in (("BN-LSTM", BNLSTM, normalized), ("LSTM", LSTM, {})):
        for name in implementations:
            own = functools.partial(
                kind_of_layer, size.features, implementation=name, **fields, **more
            )
            makers[f"{label}, {name}"] = functools.partial(layer, own, size, is_update)
    makers["Flax OptimizedLSTMCell"] = functools.partial(flax_lstm, size, kind, is_update)
    if default_device().platform == "gpu" and kind is None:
        makers["cuDNN LSTM"] = functools.partial(cudnn_lstm, size, is_update)
    if (peers := pytorch_device()) is not None:
        from experiments.benchmarking import torch_peers

        makers |= torch_peers.candidates(
            torch_peers.Pass(
                size.features,
                *make_batch(size),
                vocab_size=fields["vocab_size"],
                rate=RATE if is_update else None,
                device=peers,
                autocast=peers == "cuda" and kind is not None,  # on a CPU it is slow
            )
        )
    return makers


def pytorch_device() -> str | None:
    """PyTorch's name of the default device; None if PyTorch is not installed for it."""
    try:
        import torch
    except ImportError:
        return None
    platform = default_device().platform
    if platform == "gpu":
        return "cuda" if torch.cuda.is_available() else None
    return "cpu" if platform == "cpu" else None


def compile_all(makers: dict[str, Callable[[], Program]]) -> dict[str, Program]:
    """Compiles and runs each candidate once; prints why one fails, and leaves it out.

    Raises:
      ValueError, RuntimeError: `DEFAULT` or `PRODUCTS` fails; the others are compared with these.
    """
    made = {}
    for name, make in progress.track(makers.items(), "compiling", len(makers)):
        try:
            program = make()
            program.run()
        except (ValueError, RuntimeError) as error:  # not supported, or out of memory
            if name in (DEFAULT, PRODUCTS):
                raise
            print(f"{name}: {error}", flush=True)
        else:
            made[name] = program
    return made
