"""The recurrence as one CUDA kernel per pass: cuda.cu, called through `jax.ffi`.

A scan in XLA starts several small programs at every time step. Here one kernel runs all time steps:
multiprocessors divide the hidden units, and each keeps its part of the recurrent kernel. cuda.cu
describes how. Like `cpu`, this does not use the step of `bnlstm_jax.cells`, but implements
(BN-)LSTMs directly, in float32 with products of float32 or bfloat16. On a CPU, CUDA is emulated:
this is slow, and only for tests.

Within a call arrays are `[time, features, batch]`, the batch padded.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bnlstm_jax.normalization import Statistics, along, last_derivative, varying_alike
from bnlstm_jax.recurrence.devices import default_device
from bnlstm_jax.recurrence.native import common
from bnlstm_jax.recurrence.problem import Problem, Result, with_input_terms

SOURCE = Path(__file__).parent / "cuda.cu"
BATCHES = (32, 64, 128)  # a batch is padded to one of these sizes
LARGEST_BATCH = BATCHES[-1]
OLDEST = 8.0  # compute capability; tensor cores multiply bfloat16 from it on
TILE = 32  # the rows that blocks exchange are padded to a multiple of it
# Residuals are h, c, the recurrent term and moments; `jax.checkpoint` recomputes the rest.
_RESIDUAL = "bnlstm_jax.recurrence.native"
_SAVE_RESIDUALS = jax.checkpoint_policies.save_only_these_names(_RESIDUAL)


# ---- The library.


def platform() -> str:
    """The platform that the kernel is compiled for: `gpu`, or `cpu`, which emulates CUDA."""
    return "gpu" if default_device().platform == "gpu" else "cpu"


def load(platform: str) -> ctypes.CDLL:
    """Loads the library, and registers its two calls with XLA.

    Raises:
      RuntimeError: it cannot be compiled.
    """
    return common.load(SOURCE, platform, "Bnlstm", "bnlstm")


def padded(batch: int) -> int:
    """The size to which a batch of at most `LARGEST_BATCH` is padded."""
    return next(rows for rows in BATCHES if batch <= rows)


def why_unsupported(problem: Problem) -> str | None:
    """See `bnlstm_jax.recurrence.Implementation`."""
    if reason := common.why_unsupported(problem):
        return reason
    kernel = problem.recurrent_kernel
    operands = jnp.dtype(problem.dtype or jnp.float32)
    dtypes = {kernel.dtype, problem.carry[0].dtype}
    if operands not in (jnp.float32, jnp.bfloat16) or dtypes != {jnp.dtype(jnp.float32)}:
        return (
            "supports only param_dtype and state float32, and dtype float32 or bfloat16, got "
            f"param_dtype {kernel.dtype}, dtype {operands}, state {problem.carry[0].dtype}"
        )
    if platform() == "gpu":
        has = default_device().compute_capability  # for AMD's GPUs, a name
        if not has.replace(".", "").isdigit() or float(has) < OLDEST:
            return f"needs a GPU of compute capability {OLDEST} or newer, got {has}"
    units, rows = kernel.shape[0], padded(min(problem.carry[1].shape[0], LARGEST_BATCH))
    ask = load(platform()).BnlstmProblem
    ask.restype = ctypes.c_char_p
    problem_of_device = ask(units, rows, operands == jnp.bfloat16)
    if problem_of_device:
        raise RuntimeError(f"the GPU cannot run {SOURCE.name}: {problem_of_device.decode()}")
    if problem_of_device is not None:
        return f"does not fit this device with {units} units, {rows} rows and {operands} products"
    return None


# ---- The two calls, and the gradient.


@dataclasses.dataclass(frozen=True)
class Options:
    """The attributes of a call.

    Attributes:
      normalize_recurrent, normalize_cell: which terms are normalised.
      given: normalise by given statistics; otherwise by moments of the batch.
      epsilon: added to variances.
      operands: dtype of the operands of recurrent products, float32 or bfloat16.
      units_of_block: hidden units of a block of threads, 2, 4 or 8; 0 for the fewest that fit.
    """

    normalize_recurrent: bool
    normalize_cell: bool
    given: bool
    epsilon: float
    operands: str = "float32"
    units_of_block: int = 0

    def call(
        self,
        name: str,
        shapes: Sequence[tuple[int, ...]],
        *arrays: Array,
        aliases: dict[int, int] | None = None,
        **more: Any,
    ) -> list[Array]:
        """Calls the kernel, with buffers for the exchange between blocks.

        `aliases` maps each argument that is overwritten to the result that takes its place.
        """
        kernel, *others = arrays
        kernel = kernel.astype(self.operands)
        units, gates = kernel.shape
        exchanged = units if name == "bnlstm_forward" else gates
        rows = -(-exchanged // TILE) * TILE
        room = jax.ShapeDtypeStruct((2, rows, arrays[1].shape[-1]), kernel.dtype)
        counter = jax.ShapeDtypeStruct((1,), jnp.uint32)
        results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        results += [room, counter]
        call = jax.ffi.ffi_call(
            name, results, vmap_method="sequential", input_output_aliases=aliases
        )
        attributes = dataclasses.asdict(self) | {"epsilon": np.float32(self.epsilon)} | more
        del attributes["operands"]  # given by the kernel's dtype
        # JAX takes the results of a call for equal on all devices of a `shard_map`.
        _, *found = varying_alike([kernel, *call(kernel, *others, **attributes)])
        return found[:-2]


class Inputs(NamedTuple):
    """The arrays of a call, in float32.

    Attributes:
      kernel: the recurrent kernel `[H, 4H]`.
      pre_activation: input term and bias, `[T, 4H, B]`.
      flags: see `common.flags`, bytes `[T, B]`.
      recurrent_scale, cell_scale, cell_bias: `[4H]`, `[H]`, `[H]`.
      cell, hidden: the initial state, `[H, B]`.
      recurrent_statistics, cell_statistics: given mean and variance, `[T, 2, 4H]`, `[T, 2, H]`.
    """

    kernel: Array
    pre_activation: Array
    flags: Array
    recurrent_scale: Array
    cell_scale: Array
    cell_bias: Array
    cell: Array
    hidden: Array
    recurrent_statistics: Array
    cell_statistics: Array


def forward_call(options: Options, inputs: Inputs, keep: bool) -> list[Array]:
    """Hidden states and cells `[T, H, B]`, recurrent terms `[T, 4H, B]`, moments like statistics.

    Unless `keep`, there is only the last cell, and recurrent terms are empty. Moments are empty if
    statistics are given.
    """
    steps, gates, batch = inputs.pre_activation.shape
    units, found = gates // 4, 0 if options.given else steps
    states, cells = (steps, units, batch), (steps if keep else 1, units, batch)
    terms, moments = (steps if keep else 0, gates, batch), ((found, 2, gates), (found, 2, units))
    return options.call("bnlstm_forward", (states, cells, terms, *moments), *inputs, keep=keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def call_kernel(options: Options, inputs: Inputs) -> tuple[Array, ...]:
    """Hidden states, the last cell, moments of recurrent term and cell."""
    hidden, cell, _, *moments = forward_call(options, inputs, keep=False)
    return hidden, cell[-1], *moments


def _forward(options, inputs):
    inputs = last_derivative("implementation 'gpu'", inputs)
    # `jax.checkpoint` around the call recomputes `inputs` instead of storing them.
    results = forward_call(options, inputs, keep=True)
    hidden, cell, recurrent_term, *moments = (checkpoint_name(x, _RESIDUAL) for x in results)
    return (hidden, cell[-1], *moments), (inputs, hidden, cell, recurrent_term, *moments)


def _backward(options, residuals, gradients):
    residuals, gradients = last_derivative("implementation 'gpu'", (residuals, gradients))
    inputs, hidden, cell, recurrent_term, *moments = residuals
    d_hidden, d_cell, *_ = gradients
    if not options.given:
        inputs = inputs._replace(recurrent_statistics=moments[0], cell_statistics=moments[1])
    terms, state = inputs.pre_activation.shape, inputs.cell.shape
    d_pre, d_term, *d_others = options.call(
        "bnlstm_backward",
        (terms, terms, terms[1:2], state[:1], state[:1], state, state),
        *(*inputs, cell, recurrent_term, d_hidden, d_cell),
        # The gradients overwrite pre-activations and recurrent terms: the kernel reads a time step
        # of these before it writes its gradients.
        aliases={Inputs._fields.index("pre_activation"): 0, len(inputs) + 1: 1},
    )
    entering = jnp.concatenate([inputs.hidden[None], hidden[:-1]])
    d_kernel = jax.lax.dot_general(
        entering.astype(options.operands),
        d_term.astype(options.operands),
        (((0, 2), (0, 2)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return (Inputs(d_kernel, d_pre, None, *d_others, None, None),)


call_kernel.defvjp(_forward, _backward)


# ---- From a problem and back.


def run(problem: Problem, units_of_block: int = 0) -> Result:
    """Runs a problem of at most `LARGEST_BATCH` sequences; given statistics have no gradient.

    Raises:
      RuntimeError: the kernel cannot be compiled.
    """
    load(platform())
    statistics = jax.lax.stop_gradient(problem.statistics)
    return _run(problem.replace(statistics=statistics), units_of_block)


@functools.partial(jax.checkpoint, policy=_SAVE_RESIDUALS, static_argnums=(1,))
def _run(problem: Problem, units_of_block: int) -> Result:
    problem, moments = with_input_terms(problem, ahead=True, normalized=True)
    batch, terms = problem.carry[1].shape[0], problem.norm.terms
    given = problem.statistics is not None
    operands = jnp.dtype(problem.dtype or jnp.float32).name
    normalized = "recurrent" in terms, "cell" in terms
    options = Options(*normalized, given, problem.norm.epsilon, operands, units_of_block)

    def from_kernel(x: Array) -> Array:
        return jnp.swapaxes(x[..., :batch], -1, -2)

    hidden, cell, *found = call_kernel(options, varying_alike(to_inputs(problem)))
    hidden = from_kernel(hidden)
    for term, stacked in zip(("recurrent", "cell"), found, strict=True):
        if term in terms and not given:
            moments[term] = Statistics(stacked[:, 0], stacked[:, 1])
    return Result((from_kernel(cell), hidden[-1]), hidden, moments)


def to_inputs(problem: Problem) -> Inputs:
    """The arrays of a call for a problem whose `inputs` are input terms."""
    terms = problem.source
    steps, batch, gates = terms.shape
    units, params, norm = gates // 4, problem.params, problem.norm
    cell, hidden = problem.carry
    padding = padded(batch) - batch

    def to_kernel(x: Array) -> Array:
        x = jnp.swapaxes(x, -1, -2)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])

    def statistics(term: str, size: int) -> Array:
        if problem.statistics is None or term not in norm.terms:
            given = steps if problem.statistics is not None else 0
            return jnp.zeros((given, 2, size), jnp.float32)
        return jnp.stack(problem.statistics[term], 1)

    return Inputs(
        problem.recurrent_kernel,
        to_kernel(terms + along(terms, params["bias"])),
        jnp.pad(common.flags(problem), [(0, 0), (0, padding)]),
        params.get("recurrent_scale", jnp.ones(gates, jnp.float32)),
        params.get("cell_scale", jnp.ones(units, jnp.float32)),
        params.get("cell_bias", jnp.zeros(units, jnp.float32)),
        to_kernel(cell),
        to_kernel(hidden),
        statistics("recurrent", gates),
        statistics("cell", units),
    )
