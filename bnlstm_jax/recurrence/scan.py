"""Recurrences as `jax.lax.scan` of a step, for every device.

JAX differentiates `reference`. `xla` has a hand-written backward pass with fewer residuals: the
entering carry, the recurrent term and the moments of each step. It re-runs and differentiates each
step for the rest. The gradient of the recurrent kernel, which JAX would add up step by step, is one
product after the backward scan. `xla` does not support forward mode or, under batch statistics,
second derivatives.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bnlstm_jax.cells import Carry, product
from bnlstm_jax.recurrence.problem import (
    Problem,
    Result,
    gradient,
    step,
    step_gradients,
    transpose,
    with_input_terms,
)


def reference(problem: Problem) -> Result:
    """A plain scan: supports all derivatives, but takes more time and memory for gradients."""
    problem = problem.replace(norm=dataclasses.replace(problem.norm, analytic=False))
    problem, moments = with_input_terms(problem)
    return Result.of(_scan(problem), moments)


def xla(problem: Problem) -> Result:
    """The scan with fewer residuals."""
    if problem.statistics is not None:  # only the plain scan differentiates by them
        return reference(problem)
    problem, moments = with_input_terms(problem)
    return Result.of(_lean_scan(problem), moments)


def _scan(problem: Problem, keep: bool = False) -> tuple[Carry, Any, Any]:
    """The last carry, hidden states `[T, B, H]`, and stacked moments.

    If `keep`, residuals replace the hidden states: each step's entering carry and recurrent term.
    """
    kernel = problem.recurrent_kernel.astype(problem.operand_dtype)

    def body(carry, now):
        recurrent_term = product(carry[1], kernel, problem.operand_dtype)
        after, moments = step(problem.replace(carry=carry, **now), recurrent_term)
        return after, ((carry, recurrent_term) if keep else after[1], moments)

    last, (outputs, moments) = jax.lax.scan(
        body, problem.carry, problem.over_time, unroll=problem.unroll
    )
    return last, outputs, moments


@jax.custom_vjp
def _lean_scan(problem: Problem) -> tuple[Carry, Array, Any]:
    return _scan(problem)


def _forward(problem: Problem) -> tuple[tuple, tuple]:
    last, (carries, recurrent_terms), moments = _scan(problem, keep=True)
    hidden = jnp.concatenate([carries[1][1:], last[1][None]])
    return (last, hidden, moments), (problem, carries, recurrent_terms, moments)


def _backward(residuals: tuple, gradients: tuple) -> tuple[Problem]:
    problem, carries, recurrent_terms, moments = residuals
    d_last, d_hidden, _ = gradients
    transposed = transpose(problem.recurrent_kernel.astype(problem.operand_dtype))

    # `rows[t]` holds the recurrent term of step t until the step is run, then the term's gradient.
    # Rows are read one step ahead: XLA would copy an array whose row is read and written in a step.
    def body(state, now):
        d_carry, d_params, rows, recurrent_term = state
        t, carry, of_step, moments, d_output = now
        d_carry = d_carry[0], d_carry[1] + d_output
        at_step = problem.replace(carry=carry, **of_step)
        d_of_step, d_carry, d_term, d_inputs = step_gradients(
            step, at_step, recurrent_term, moments, d_carry
        )
        d_carry = d_carry[0], d_carry[1] + product(d_term, transposed, problem.operand_dtype)
        rows = jax.lax.dynamic_update_index_in_dim(rows, d_term, t, 0)
        ahead = jax.lax.dynamic_index_in_dim(rows, jnp.maximum(t - 1, 0), 0, keepdims=False)
        d_params = jax.tree.map(jnp.add, d_params, d_of_step)
        return (d_carry, d_params, rows, ahead), d_inputs

    zeros = jax.tree.map(jnp.zeros_like, problem.params)
    steps = jnp.arange(d_hidden.shape[0])
    (d_carry, d_params, d_terms, _), d_inputs = jax.lax.scan(
        body,
        (d_last, zeros, recurrent_terms, recurrent_terms[-1]),
        (steps, carries, problem.over_time, moments, d_hidden),
        reverse=True,
        unroll=problem.unroll,
    )
    return (gradient(problem, carries[1], d_terms, d_params, d_carry, d_inputs),)


_lean_scan.defvjp(_forward, _backward)
