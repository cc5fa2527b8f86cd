"""The recurrence of an LSTM in C++, for CPUs: cpu_kernel/, called through `jax.ffi`.

XLA packs the recurrent kernel again at every time step, and runs each time step as several small
programs. Here one call runs all time steps, and threads divide the hidden units; recurrence.cc
describes how. Like `cuda`, this does not use the step of `bnlstm_jax.cells`, but implements
(BN-)LSTMs directly, in float32.

`BNLSTM_NUM_THREADS` is the largest number of threads of a call. The default is the number of
processors that the process may use, by its affinity and its container's quota. Results do not
depend on it. `jax.vmap` runs the mapped calls one after the other.
"""

import ctypes
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlstm_jax.cells import TERMS, as_symbols
from bnlstm_jax.normalization import Statistics, last_derivative, varying_alike
from bnlstm_jax.recurrence.native import common
from bnlstm_jax.recurrence.problem import Problem, Result, with_input_terms

SOURCE = Path(__file__).parent / "cpu_kernel" / "recurrence.cc"
INPUTS, SYMBOLS, INPUT_TERMS = range(3)  # sources of input terms
GATES = {"input": 4, "recurrent": 4, "cell": 1}  # features of a term, for each unit
STATISTICS = tuple(f"{term}_statistics" for term in GATES)
# The axes of an array from the slowest to the fastest in memory; None for JAX's default order.
# `SEQUENCES` are arrays `[T, B, F]` in the memory order of a layer's default, `[B, T, F]`.
Layout = tuple[int, ...] | None
SEQUENCES = (1, 0, 2)


# ---- The library.


def load() -> ctypes.CDLL:
    """Loads the library, and registers its two calls with XLA.

    Raises:
      RuntimeError: it cannot be compiled.
    """
    return common.load(SOURCE, "cpu", "BnlstmCpu", "bnlstm_cpu")


def instruction_set() -> str:
    """The vector instruction set that the library uses."""
    name = load().BnlstmInstructionSet
    name.restype = ctypes.c_char_p
    return name().decode()


def threads() -> int:
    """The most threads that a call may use.

    Raises:
      ValueError: `BNLSTM_NUM_THREADS` is not a number of threads.
    """
    number = load().BnlstmThreads()
    if number == 0:
        given = os.environ["BNLSTM_NUM_THREADS"]
        raise ValueError(f"BNLSTM_NUM_THREADS: expected 1 to 4096 threads, got {given!r}")
    return number


def peak() -> float:
    """Peak float32 operations per second of a call's threads, measured for half a second."""
    measure = load().BnlstmPeak
    measure.restype = ctypes.c_double
    return measure()


def why_unsupported(problem: Problem) -> str | None:
    """See `bnlstm_jax.recurrence.Implementation`."""
    if reason := common.why_unsupported(problem):
        return reason
    kernel = problem.recurrent_kernel
    operands = jnp.dtype(problem.dtype or jnp.float32)
    dtypes = {operands, kernel.dtype, problem.carry[0].dtype}
    if dtypes != {jnp.dtype(jnp.float32)}:
        return (
            f"supports only float32, got param_dtype {kernel.dtype}, dtype {operands}, state "
            f"{problem.carry[0].dtype}"
        )
    load()
    return None


# ---- The two calls, and the gradient.


@dataclasses.dataclass(frozen=True)
class Options:
    """The attributes of a call.

    Attributes:
      source: the source of input terms: `INPUTS`, `SYMBOLS` or `INPUT_TERMS`.
      terms: the normalised terms.
      given: normalise by given statistics; otherwise by moments of the batch.
      masked: whether there are flags.
      epsilon: added to the variances of the recurrent term and the cell.
      input_epsilon: added to the variances of the input term.
    """

    source: int
    terms: tuple[str, ...]
    given: bool
    masked: bool
    epsilon: float
    input_epsilon: float

    def sizes(self, inputs: "Inputs") -> dict[str, int]:
        """Sizes of a call: steps, batch, units and features."""
        steps, batch = (inputs.symbols if self.source == SYMBOLS else inputs.inputs).shape[:2]
        features = inputs.inputs if self.source == INPUT_TERMS else inputs.input_kernel
        axis = -1 if self.source == INPUT_TERMS else 0
        return {
            "steps": steps,
            "batch": batch,
            "units": len(inputs.recurrent_kernel),
            "features": features.shape[axis],
        }

    def call(
        self,
        name: str,
        results: Sequence[tuple[tuple[int, ...], Layout]],
        inputs: "Inputs",
        others: Sequence[tuple[Array, Layout]] = (),
        keep: bool = True,
    ) -> list[Array]:
        """Calls the kernel; `others` and `results` pair each array or shape with its layout."""
        layouts = [layout(field, array.shape) for field, array in inputs._asdict().items()]
        call = jax.ffi.ffi_call(
            name,
            [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in results],
            vmap_method="sequential",
            input_layouts=[*layouts, *(layout for _, layout in others)],
            output_layouts=[layout for _, layout in results],
        )
        attributes: dict[str, Any] = {
            name: np.int64(size) for name, size in self.sizes(inputs).items()
        }
        attributes |= {f"normalize_{term}": term in self.terms for term in TERMS}
        found = call(
            *inputs,
            *(array for array, _ in others),
            source=np.int64(self.source),
            given=self.given,
            masked=self.masked,
            keep=keep,
            epsilon=np.float32(self.epsilon),
            input_epsilon=np.float32(self.input_epsilon),
            **attributes,
        )
        # JAX takes the results of a call for equal on all devices of a `shard_map`.
        _, *found = varying_alike([inputs.recurrent_kernel, *found])
        return found


def layout(field: str, shape: tuple[int, ...]) -> Layout | None:
    """The layout of an argument of a call; None for JAX's default.

    Empty arrays have the default: XLA's compiler divides by zero when it copies one to another
    layout.
    """
    return SEQUENCES if field == "inputs" and 0 not in shape else None


class Inputs(NamedTuple):
    """The arrays of a call, float32 except symbols and flags.

    A scale that a problem lacks is ones, and a cell bias zeros. Other arrays that it lacks are
    empty.

    Attributes:
      recurrent_kernel: `[H, 4H]`.
      input_kernel: `[D, 4H]`.
      bias: `[4H]`.
      inputs: `[T, B, D]`, or input terms `[T, B, 4H]`.
      symbols: integers `[T, B]`.
      flags: see `common.flags`, bytes `[T, B]`.
      input_scale, recurrent_scale, cell_scale, cell_bias: `[4H]`, `[4H]`, `[H]`, `[H]`.
      cell, hidden: the initial state, `[B, H]`.
      input_statistics, recurrent_statistics, cell_statistics: given mean and variance, `[T, 2, F]`.
    """

    recurrent_kernel: Array
    input_kernel: Array
    bias: Array
    inputs: Array
    symbols: Array
    flags: Array
    input_scale: Array
    recurrent_scale: Array
    cell_scale: Array
    cell_bias: Array
    cell: Array
    hidden: Array
    input_statistics: Array
    recurrent_statistics: Array
    cell_statistics: Array


def forward_call(options: Options, inputs: Inputs, keep: bool) -> list[Array]:
    """Hidden states `[T, B, H]`, the last cell, cells, recurrent terms, and moments of each term.

    Cells and recurrent terms are empty unless `keep`. The moments of a term are empty if it is not
    normalised, or normalised by given statistics.
    """
    sizes = options.sizes(inputs)
    steps, batch, units = sizes["steps"], sizes["batch"], sizes["units"]
    kept = steps if keep else 0
    results = [
        ((steps, batch, units), SEQUENCES),
        ((batch, units), None),
        ((kept, units, batch), None),
        ((kept, units, 4, batch), None),
    ]
    for term, gates in GATES.items():
        found = term in options.terms and not options.given
        results.append(((steps if found else 0, 2, gates * units), None))
    return options.call("bnlstm_cpu_forward", results, inputs, keep=keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def call_kernel(options: Options, inputs: Inputs) -> tuple[Array, ...]:
    """Hidden states, the last cell, moments of each term."""
    hidden, cell, _, _, *moments = forward_call(options, inputs, keep=False)
    return hidden, cell, *moments


def _forward(options, inputs):
    inputs = last_derivative("implementation 'cpu'", inputs)
    hidden, last_cell, cell, recurrent_term, *moments = forward_call(options, inputs, keep=True)
    return (hidden, last_cell, *moments), (inputs, hidden, cell, recurrent_term, *moments)


def _backward(options, residuals, gradients):
    residuals, gradients = last_derivative("implementation 'cpu'", (residuals, gradients))
    inputs, hidden, cell, recurrent_term, *moments = residuals
    d_hidden, d_cell, *_ = gradients
    if not options.given:
        inputs = inputs._replace(**dict(zip(STATISTICS, moments, strict=True)))
    fields = [field for field in Inputs._fields if field not in ("symbols", "flags")]
    results = []
    for field in fields:
        shape = getattr(inputs, field).shape
        if field in STATISTICS and not options.given:
            shape = (0, *shape[1:])
        results.append((shape, layout(field, shape)))
    others = [
        (hidden, SEQUENCES),
        (cell, None),
        (recurrent_term, None),
        (d_hidden, SEQUENCES),
        (d_cell, None),
    ]
    found = options.call("bnlstm_cpu_backward", results, inputs, others)
    return (Inputs(**dict(zip(fields, found, strict=True)), symbols=None, flags=None),)


call_kernel.defvjp(_forward, _backward)


# ---- From a problem and back.


def run(problem: Problem) -> Result:
    """Runs a problem.

    Raises:
      RuntimeError: the kernel cannot be compiled.
    """
    load()
    moments: dict[str, Statistics] = {}
    # Each call of the kernel packs the whole table. If the problem has fewer symbols than the table
    # has rows, XLA looks them up instead.
    few = problem.symbols is not None and problem.symbols.size < len(problem.params["input_kernel"])
    if few or problem.norm.whole_input:
        problem, moments = with_input_terms(problem, few, normalized=problem.norm.whole_input)
    terms, given = problem.norm.terms, problem.statistics is not None
    options, inputs = to_inputs(problem)
    hidden, cell, *found = call_kernel(options, varying_alike(inputs))
    for term, stacked in zip(GATES, found, strict=True):
        if term in terms and not given:
            moments[term] = jax.lax.stop_gradient(Statistics(stacked[:, 0], stacked[:, 1]))
    return Result((cell, hidden[-1]), hidden, moments)


def to_inputs(problem: Problem) -> tuple[Options, Inputs]:
    """The options and arrays of the call for a problem."""
    norm, params, masked = problem.norm, problem.params, problem.valid is not None
    units = len(problem.recurrent_kernel)
    sizes = {term: gates * units for term, gates in GATES.items()}
    source = INPUTS if problem.symbols is None else SYMBOLS
    source = source if "input_kernel" in params else INPUT_TERMS
    given = problem.statistics is not None

    def zeros(*shape: int, dtype=jnp.float32) -> Array:
        return jnp.zeros(shape, dtype)

    def scale(term: str) -> Array:
        return params.get(f"{term}_scale", jnp.ones(sizes[term], jnp.float32))

    def statistics(term: str) -> Array:
        if problem.statistics is None or term not in norm.terms:
            return zeros(0, 2, sizes[term])
        return jnp.stack(problem.statistics[term], 1)

    inputs, symbols = zeros(0, 0, 0), zeros(0, 0, dtype=jnp.int32)
    if source == SYMBOLS:
        symbols = as_symbols(problem.source, len(params["input_kernel"]))
    else:
        inputs = problem.source.astype(jnp.float32)
    epsilon = norm.epsilon if norm.input_epsilon is None else norm.input_epsilon
    options = Options(source, norm.terms, given, masked, norm.epsilon, epsilon)
    return options, Inputs(
        recurrent_kernel=problem.recurrent_kernel,
        input_kernel=params.get("input_kernel", zeros(0, 4 * units)),
        bias=params["bias"],
        inputs=inputs,
        symbols=symbols,
        flags=common.flags(problem) if masked else zeros(0, 0, dtype=jnp.uint8),
        input_scale=scale("input"),
        recurrent_scale=scale("recurrent"),
        cell_scale=scale("cell"),
        cell_bias=params.get("cell_bias", zeros(units)),
        cell=problem.carry[0],
        hidden=problem.carry[1],
        input_statistics=statistics("input"),
        recurrent_statistics=statistics("recurrent"),
        cell_statistics=statistics("cell"),
    )
