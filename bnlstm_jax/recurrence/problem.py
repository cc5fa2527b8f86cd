"""The inputs and outputs of a recurrence, one step of it, and the gradient of that step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from bnlstm_jax.cells import Carry, look_up, lstm_step, product
from bnlstm_jax.jax_experimental import Layout, with_layout_constraint
from bnlstm_jax.normalization import Moments, Normalization, Statistics

# Inputs of at most this many features are multiplied by their kernel in each step, and again in the
# backward pass. On CPU this is faster than storing the product `[T, B, 4H]`, and a training step
# takes half of the memory. Other devices are not measured yet.
SMALL_INPUT = 256


class Problem(struct.PyTreeNode):
    """A recurrence over T steps of B sequences, with H units. All arrays are time-major.

    `step` takes a `Problem` with the arrays of one time step: `inputs [B, D]`, and so on.

    Attributes:
      recurrent_kernel: `[H, 4H]`.
      params: the other parameters by name, in the dtype of statistics: `bias [4H]`, optionally
        `cell_bias [H]`, `{term}_scale [F]` of normalised terms; and `input_kernel [D, 4H]`, unless
        `inputs` are the input terms.
      carry: the initial `(c, h)`, each `[B, H]`, in the dtype of statistics.
      inputs: `[T, B, D]`, or without an `input_kernel` the input terms `[T, B, 4H]`; None for
        symbols.
      symbols: integers `[T, B]` in place of inputs.
      valid: boolean `[T, B, 1]`; steps that are not valid, the padding, keep the state. None if all
        are valid.
      statistics: given statistics by term (inference), each `[T, F]`, or `[F]` for the input term
        with `whole_input`. None to normalise by batch moments (training).
      norm: which terms are normalised, and how.
      dtype: dtype of the operands of matrix products; None for their promoted dtype.
      unroll: time steps per iteration of a compiled loop.
    """

    recurrent_kernel: Array
    params: dict[str, Array]
    carry: Carry
    inputs: Array | None
    symbols: Array | None = None
    valid: Array | None = None
    statistics: dict[str, Statistics] | None = None
    norm: Normalization = struct.field(pytree_node=False, default=Normalization())
    dtype: Any = struct.field(pytree_node=False, default=None)
    unroll: int = struct.field(pytree_node=False, default=1)

    @property
    def source(self) -> Array:
        """The inputs, or the symbols in place of them."""
        source = self.inputs if self.symbols is None else self.symbols
        assert source is not None
        return source

    @property
    def over_time(self) -> dict[str, Any]:
        """The fields with a time axis."""
        names = "inputs", "symbols", "valid", "statistics"
        return {name: getattr(self, name) for name in names}

    @property
    def operand_dtype(self) -> Any:
        """The dtype of the operands of recurrent products."""
        return self.dtype or jnp.promote_types(self.carry[1].dtype, self.recurrent_kernel.dtype)


class Result(struct.PyTreeNode):
    """The outputs of a recurrence.

    Attributes:
      carry: the `(c, h)` after the last step, each `[B, H]`.
      hidden: the hidden states of all steps, `[T, B, H]`.
      moments: the batch moments that normalised each term, `[T, F]`, or `[F]` for the input term
        with `whole_input`. They have no gradient.
    """

    carry: Carry
    hidden: Array
    moments: dict[str, Statistics]

    @classmethod
    def of(cls, scanned: tuple, moments: dict[str, Statistics]) -> "Result":
        """The result from the outputs of a scan, and moments that were computed before it."""
        carry, hidden, stacked = scanned
        stacked = {term: m.statistics() for term, m in stacked.items() if m is not None}
        return cls(carry, hidden, jax.lax.stop_gradient(moments | stacked))


def input_term(problem: Problem) -> Array:
    """`x W_x` of inputs or symbols, for one step or all steps, `[..., B, 4H]`."""
    kernel = problem.params["input_kernel"]
    if problem.symbols is not None:
        return look_up(problem.symbols, kernel, problem.dtype)
    return product(problem.source, kernel, problem.dtype)


def with_input_terms(
    problem: Problem, ahead: bool = False, normalized: bool = False
) -> tuple[Problem, dict[str, Statistics]]:
    """Computes the input terms of all steps ahead of the recurrence, if needed.

    This is needed if inputs have more than `SMALL_INPUT` features, if `whole_input` is set, or if
    the caller asks for it.

    Args:
      problem: a problem with inputs or symbols.
      ahead: compute the input terms in any case.
      normalized: also normalise them here, for a kernel that cannot.

    Returns:
      The problem, and the batch moments of the input term if they normalised it here.
    """
    normalized = "input" in problem.norm.terms and (normalized or problem.norm.whole_input)
    if not (ahead or normalized or len(problem.params["input_kernel"]) > SMALL_INPUT):
        return problem, {}
    terms, params = input_term(problem), dict(problem.params)
    del params["input_kernel"]
    problem = problem.replace(inputs=terms, symbols=None, params=params)
    if not normalized:
        return problem, {}
    norm, statistics = problem.norm, problem.statistics
    terms, moments = norm.apply("input", terms, params, statistics, problem.valid)
    others = tuple(term for term in norm.terms if term != "input")
    if statistics is not None:
        statistics = {term: statistics[term] for term in others}
    problem = problem.replace(
        inputs=terms, statistics=statistics, norm=dataclasses.replace(norm, terms=others)
    )
    return problem, {} if moments is None else {"input": moments.statistics(norm.axis("input"))}


def step(
    problem: Problem, recurrent_term: Array, known: dict[str, Moments | None] | None = None
) -> tuple[Carry, dict[str, Moments | None]]:
    """One step of a problem with the arrays of this step; see `lstm_step`.

    `known`: the moments that the step returned, when it is re-run for its gradient; else None.
    """

    def normalize(term: str, x: Array) -> tuple[Array, Moments | None]:
        moments = None if known is None else known[term]
        return problem.norm.apply(
            term, x, problem.params, problem.statistics, problem.valid, moments
        )

    terms = input_term(problem) if "input_kernel" in problem.params else problem.source
    return lstm_step(problem.params, problem.carry, recurrent_term, terms, normalize, problem.valid)


def step_gradients(
    step: Callable, problem: Problem, recurrent_term: Array, moments: Any, d_carry: Carry
) -> tuple[dict[str, Array], Carry, Array, Array | None]:
    """The backward pass of one `step`, from its arguments and the gradient of its new carry.

    Returns:
      `d_params`, `d_carry` without the gradient through the recurrent product, `d_recurrent_term`,
      `d_inputs`.
    """

    def differentiable(params, carry, recurrent_term, inputs):
        now = problem.replace(params=params, carry=carry, inputs=inputs)
        return step(now, recurrent_term, moments)[0]

    _, pull_back = jax.vjp(
        differentiable, problem.params, problem.carry, recurrent_term, problem.inputs
    )
    return pull_back(d_carry)


def gradient(
    problem: Problem,
    hidden: Array,
    d_terms: Array,
    d_params: dict[str, Array],
    d_carry: Carry,
    d_inputs: Array | None,
) -> Problem:
    """The gradient of a problem, for `jax.custom_vjp`.

    The gradient of the recurrent kernel is computed here, as one product. Symbols, masks and
    statistics have no gradient. `hidden` are the hidden states that entered the steps, `[T, B, H]`,
    and `d_terms` the gradients of recurrent terms, `[T, B, 4H]`.
    """
    dtype = problem.operand_dtype
    hidden, d_terms = (x.reshape(-1, x.shape[-1]) for x in (hidden, d_terms))
    d_kernel = product(transpose(hidden.astype(dtype)), d_terms, dtype)
    d_kernel = d_kernel.astype(problem.recurrent_kernel.dtype)
    without = dict.fromkeys(problem.over_time)
    problem = problem.replace(**without, recurrent_kernel=d_kernel, params=d_params, carry=d_carry)
    return problem.replace(inputs=d_inputs)


def transpose(x: Array) -> Array:
    """`x.T`, as an operand of a product."""
    if x.dtype != jnp.bfloat16:
        return x.T

    # On CPU, XLA's bfloat16 product is fast only if both operands are row-major.
    def in_rows(x: Array) -> Array:
        return with_layout_constraint(x.T, Layout((0, 1)))

    return jax.lax.platform_dependent(x, cpu=in_rows, default=jnp.transpose)
