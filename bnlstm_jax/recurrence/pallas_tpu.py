"""The recurrence in one TPU kernel: only the arrays of a step move between chip and main memory.

A scan in XLA starts several small programs at every step and reads the recurrent kernel from main
memory each time. Here one Pallas kernel runs all steps. The recurrent kernel, the other parameters
and the state stay in vector memory (VMEM) from the first step to the last. The arrays of a step are
copied while the previous step is computed.

The kernel runs `bnlstm_jax.recurrence.problem.step`; in the backward pass JAX differentiates it.
The residuals are the same as in `bnlstm_jax.recurrence.scan.xla`. On other devices the kernel is
interpreted, which is slow, for tests.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bnlstm_jax.cells import Carry, as_symbols, product
from bnlstm_jax.jax_experimental import pl, pltpu
from bnlstm_jax.normalization import last_derivative
from bnlstm_jax.recurrence.devices import default_device
from bnlstm_jax.recurrence.problem import (
    Problem,
    Result,
    gradient,
    step,
    step_gradients,
    with_input_terms,
)

MIB = 2**20


# ---- A scan in one kernel.


def kernel_scan(
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    constants: Any,
    carry: Any,
    xs: Any,
    *,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan` in one TPU kernel, with `constants` and carry in VMEM throughout.

    Args:
      body: maps `(constants, carry, x)` to `(carry, y)`: one step, traced in the kernel.
      constants: arrays.
      carry: arrays that enter the first step.
      xs: arrays `[T, ...]`, which may be boolean.
      reverse: run from the last step to the first; `ys` keep the order of `xs`.

    Returns:
      The carry after the last step, and `ys`, arrays `[T, ...]`.
    """
    steps = jax.tree.leaves(xs)[0].shape[0]
    x = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    _, y = jax.eval_shape(body, constants, carry, x)
    leaves, trees = zip(*map(jax.tree.flatten, (constants, carry, x, y)), strict=True)

    def at_step(t: Array) -> tuple[Array, int, int]:
        return steps - 1 - t if reverse else t, 0, 0

    blocks = [[_block_shape(leaf) for leaf in group] for group in leaves[2:]]
    resident = pl.BlockSpec(memory_space=pltpu.VMEM)
    moving = [[pl.BlockSpec((None, *block), at_step) for block in group] for group in blocks]
    results = [(leaf.shape, leaf) for leaf in leaves[1]]
    results += [((steps, *b), leaf) for b, leaf in zip(blocks[1], leaves[3], strict=True)]

    def call(interpret: bool) -> Callable:
        return pl.pallas_call(
            functools.partial(_run_step, body, trees, leaves),
            out_shape=[jax.ShapeDtypeStruct(shape, leaf.dtype) for shape, leaf in results],
            grid=(steps,),
            in_specs=[resident] * (len(leaves[0]) + len(leaves[1])) + moving[0],
            out_specs=[resident] * len(leaves[1]) + moving[1],
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=_vmem_bytes(leaves)
            ),
        )

    rows = zip(jax.tree.leaves(xs), blocks[0], strict=True)
    arguments = jax.tree.leaves((constants, carry))
    arguments += [_to_block(x).reshape(steps, *block) for x, block in rows]
    found = jax.lax.platform_dependent(*arguments, tpu=call(False), default=call(True))
    last, rows = found[: len(leaves[1])], found[len(leaves[1]) :]
    ys = [y.reshape(steps, *leaf.shape) for y, leaf in zip(rows, leaves[3], strict=True)]
    return jax.tree.unflatten(trees[1], last), jax.tree.unflatten(trees[3], ys)


def _run_step(body: Callable, trees: Any, leaves: Any, *refs: Any) -> None:
    """The kernel: one step of a scan, whose constants, carry, x and y have `trees` and `leaves`."""
    groups = []
    for group in (0, 1, 2, 1, 3):
        groups.append(refs[: len(leaves[group])])
        refs = refs[len(leaves[group]) :]
    constant_refs, first_refs, x_refs, carry_refs, y_refs = groups

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        for ref, first in zip(carry_refs, first_refs, strict=True):
            ref[...] = first[...]

    x = [_from_block(ref[...], leaf) for ref, leaf in zip(x_refs, leaves[2], strict=True)]
    values = [ref[...] for ref in constant_refs], [ref[...] for ref in carry_refs], x
    results = body(*map(jax.tree.unflatten, trees[:3], values))
    for ref, value in zip((*carry_refs, *y_refs), jax.tree.leaves(results), strict=True):
        ref[...] = value.reshape(ref.shape).astype(ref.dtype)


def _block_shape(leaf: Any) -> tuple[int, int]:
    """The shape of a step's array as two dimensions, as TPU tiles require."""
    return (1,) * (2 - len(leaf.shape)) + tuple(leaf.shape)


def _to_block(x: Array) -> Array:
    """Booleans as integers: VMEM holds no booleans."""
    return x.astype(jnp.int32) if x.dtype == jnp.bool_ else x


def _from_block(x: Array, leaf: jax.ShapeDtypeStruct) -> Array:
    x = x.reshape(leaf.shape)
    return x != 0 if leaf.dtype == jnp.bool_ else x


def _vmem_bytes(leaves: Any) -> int:
    """Bytes of VMEM to request.

    These are the constants, the carry as input and as output, two buffers of x and y, and the
    values of the body. Arrays are laid out in tiles of 8 x 128 words of 32 bits.
    """

    def tiled(leaf: Any) -> int:
        rows, columns = _block_shape(leaf)
        in_word = max(1, 4 // leaf.dtype.itemsize)
        return 4 * 8 * 128 * -(-rows // (8 * in_word)) * -(-columns // 128)

    constants, carry, x, y = (sum(map(tiled, group)) for group in leaves)
    return 16 * MIB + constants + 2 * carry + 3 * (x + y)


# ---- The recurrence.


def why_unsupported(problem: Problem) -> str | None:
    """See `bnlstm_jax.recurrence.Implementation`."""
    if problem.norm.pools and problem.statistics is None:
        return "does not support axis_name"
    of_products = jnp.dtype(problem.dtype or jnp.float32)
    dtypes = {of_products, problem.recurrent_kernel.dtype, problem.carry[0].dtype}
    has = {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    # The interpreter supports any dtype.
    if default_device().platform == "tpu" and (dtypes - has or wide):
        return "supports only a float32 state, float32 or bfloat16 products, and no jax_enable_x64"
    return None


def run(problem: Problem) -> Result:
    """Runs a problem. Given statistics have no gradient, and `unroll` has no effect."""
    # TPU kernels do not support bfloat16 products over a single feature.
    single = len(problem.params["input_kernel"]) == 1 and problem.symbols is None
    ahead = single and jnp.dtype(problem.dtype or jnp.float32) == jnp.bfloat16
    problem = problem.replace(statistics=jax.lax.stop_gradient(problem.statistics))
    problem, moments = with_input_terms(problem, ahead)
    if problem.symbols is not None:
        symbols = as_symbols(problem.symbols, len(problem.params["input_kernel"]))
        problem = problem.replace(symbols=symbols[..., None])
    return Result.of(_run(problem), moments)


def _precision(dtype: Any) -> contextlib.AbstractContextManager:
    """The precision of products in a kernel that is nearest to the user's setting.

    Mosaic supports `default` for all operands, and `highest` for 32-bit operands.
    """
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    is_default = asked in (None, "default", "fastest", "bfloat16")
    is_default |= jnp.dtype(dtype).itemsize < 4
    return jax.default_matmul_precision("default" if is_default else "highest")


def _step(problem: Problem, recurrent_term: Array, known: Any = None) -> tuple[Carry, Any]:
    """`problem.step` with symbols as one-hot vectors, because a kernel cannot index by arrays."""
    if problem.symbols is not None:
        params = dict(problem.params)
        kernel = params.pop("input_kernel")
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, (1, len(kernel)), 1)
        is_symbol = (problem.symbols >= 0) & (problem.symbols < len(kernel))
        one_hot = (problem.symbols == vocabulary).astype(kernel.dtype)
        one_hot = jnp.where(is_symbol, one_hot, jnp.nan)
        # The default precision would round the rows of the kernel.
        wide = jnp.dtype(problem.dtype or kernel.dtype).itemsize >= 4
        with jax.default_matmul_precision("highest" if wide else "default"):
            terms = product(one_hot, kernel, problem.dtype)
        problem = problem.replace(inputs=terms, symbols=None, params=params)
    return step(problem, recurrent_term, known)


def _constants(problem: Problem) -> Problem:
    """The arrays of a problem that stay in VMEM."""
    kernel = problem.recurrent_kernel.astype(problem.operand_dtype)
    moving = dict.fromkeys((*problem.over_time, "carry"))
    return problem.replace(recurrent_kernel=kernel, **moving)


def _forward_scan(problem: Problem, keep: bool) -> tuple[Carry, tuple]:
    dtype = problem.operand_dtype

    def body(constants, carry, now):
        with _precision(dtype):
            recurrent_term = product(carry[1], constants.recurrent_kernel, dtype)
            after, moments = _step(constants.replace(carry=carry, **now), recurrent_term)
        return after, (after[1], moments, (carry[0], recurrent_term) if keep else None)

    return kernel_scan(body, _constants(problem), problem.carry, problem.over_time)


@jax.custom_vjp
def _run(problem: Problem) -> tuple[Carry, Array, Any]:
    """The outputs of `scan._scan`."""
    last, (hidden, moments, _) = _forward_scan(problem, keep=False)
    return last, hidden, moments


def _forward(problem: Problem) -> tuple[tuple, tuple]:
    problem = last_derivative("implementation 'tpu'", problem)
    last, (hidden, moments, (cells, recurrent_terms)) = _forward_scan(problem, keep=True)
    entering = jnp.concatenate([problem.carry[1][None], hidden[:-1]])
    return (last, hidden, moments), (problem, (cells, entering), recurrent_terms, moments)


def _backward(residuals: tuple, gradients: tuple) -> tuple[Problem]:
    residuals, gradients = last_derivative("implementation 'tpu'", (residuals, gradients))
    problem, carries, recurrent_terms, moments = residuals
    d_last, d_hidden, _ = gradients
    dtype = problem.operand_dtype

    def body(constants, state, now):
        d_carry, d_params = state
        carry, recurrent_term, of_step, moments, d_output = now
        d_carry = d_carry[0], d_carry[1] + d_output
        at_step = constants.replace(carry=carry, **of_step)
        with _precision(dtype):
            d_of_step, d_carry, d_term, d_inputs = step_gradients(
                _step, at_step, recurrent_term, moments, d_carry
            )
            d_h = jax.lax.dot_general(
                d_term.astype(dtype),
                constants.recurrent_kernel,
                (((1,), (1,)), ((), ())),
                preferred_element_type=d_term.dtype,
            )
        d_carry = d_carry[0], d_carry[1] + d_h
        return (d_carry, jax.tree.map(jnp.add, d_params, d_of_step)), (d_term, d_inputs)

    (d_carry, d_params), (d_terms, d_inputs) = kernel_scan(
        body,
        _constants(problem),
        (d_last, jax.tree.map(jnp.zeros_like, problem.params)),
        (carries, recurrent_terms, problem.over_time, moments, d_hidden),
        reverse=True,
    )
    return (gradient(problem, carries[1], d_terms, d_params, d_carry, d_inputs),)


_run.defvjp(_forward, _backward)
