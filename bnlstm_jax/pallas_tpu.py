"""The recurrence over time in one TPU kernel: nothing but rows of sequences leaves the chip.

A scan in XLA starts several small programs at every step, and reads the recurrent kernel from main
memory each time. Here one Pallas kernel runs all steps. The recurrent kernel, the other parameters
and the state stay in vector memory (VMEM) from the first step to the last; only what belongs to one
step is moved in and out, while the step before it is computed.

The step itself is `bnlstm_jax.cells.lstm_step`, forward as it is and backward differentiated by
JAX, as in `bnlstm_jax.implementations.xla`, whose residuals are the same. On other devices than
TPUs the kernel is interpreted, which is slow and serves to test it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bnlstm_jax.cells import product

MIB = 2**20


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
      body: `(constants, carry, x)` to `(carry, y)`: what a step does. It is traced in the kernel.
      constants: arrays.
      carry: arrays, what the first step is given.
      xs: arrays `[time, ...]`, boolean ones too.
      reverse: from the last step to the first; the results of a step lie where its inputs do.

    Returns:
      The carry after the last step, and the results `[time, ...]`.
    """
    steps = jax.tree.leaves(xs)[0].shape[0]
    of_step = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    _, ys = jax.eval_shape(body, constants, carry, of_step)
    shapes, treedefs = zip(*map(jax.tree.flatten, (constants, carry, of_step, ys)), strict=True)
    counts = [len(leaves) for leaves in shapes]

    def run(refs: tuple[Any, ...]) -> None:
        groups = []
        for count in (*counts[:3], counts[1], counts[3]):
            groups.append(refs[:count])
            refs = refs[count:]
        constant_refs, first_refs, x_refs, carry_refs, y_refs = groups

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            for ref, first in zip(carry_refs, first_refs, strict=True):
                ref[...] = first[...]

        x = [_from_block(ref[...], x) for ref, x in zip(x_refs, shapes[2], strict=True)]
        values = [ref[...] for ref in constant_refs], [ref[...] for ref in carry_refs], x
        values = map(jax.tree.unflatten, treedefs[:3], values)
        for refs, results in zip((carry_refs, y_refs), body(*values), strict=True):
            for ref, value in zip(refs, jax.tree.leaves(results), strict=True):
                ref[...] = value.reshape(ref.shape).astype(ref.dtype)

    def at_step(t: Array) -> tuple[Array, int, int]:
        return steps - 1 - t if reverse else t, 0, 0

    blocks = [[_block_shape(x.shape) for x in shapes[group]] for group in (2, 3)]
    resident = pl.BlockSpec(memory_space=pltpu.VMEM)
    moving = [[pl.BlockSpec((None, *block), at_step) for block in group] for group in blocks]
    arguments = [
        *jax.tree.leaves((constants, carry)),
        *(
            _to_block(x).reshape(steps, *block)
            for x, block in zip(jax.tree.leaves(xs), blocks[0], strict=True)
        ),
    ]
    out_shape = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in shapes[1]]
    out_shape += [
        jax.ShapeDtypeStruct((steps, *block), leaf.dtype)
        for block, leaf in zip(blocks[1], shapes[3], strict=True)
    ]

    def call(interpret: bool) -> Callable:
        return pl.pallas_call(
            lambda *refs: run(refs),
            out_shape=out_shape,
            grid=(steps,),
            in_specs=[resident] * sum(counts[:2]) + moving[0],
            out_specs=[resident] * counts[1] + moving[1],
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=_vmem(shapes)
            ),
        )

    results = jax.lax.platform_dependent(*arguments, tpu=call(False), default=call(True))
    last = jax.tree.unflatten(treedefs[1], results[: counts[1]])
    stacked = [
        y.reshape(steps, *leaf.shape)
        for y, leaf in zip(results[counts[1] :], shapes[3], strict=True)
    ]
    return last, jax.tree.unflatten(treedefs[3], stacked)


def _block_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of what belongs to a step, in two dimensions, as the hardware has it."""
    return (1,) * (2 - len(shape)) + tuple(shape)


def _to_block(x: Array) -> Array:
    """VMEM holds no booleans."""
    return x.astype(jnp.int32) if x.dtype == jnp.bool_ else x


def _from_block(x: Array, leaf: jax.ShapeDtypeStruct) -> Array:
    x = x.reshape(leaf.shape)
    return x != 0 if leaf.dtype == jnp.bool_ else x


def _vmem(shapes: tuple[list[Any], ...]) -> int:
    """Bytes of VMEM to ask for: what stays once, what moves twice, and for the body's own values.

    Counted in tiles of 8 x 128 words of 32 bits, as they are laid out.
    """

    def tiled(leaf: Any) -> int:
        rows, columns = _block_shape(leaf.shape)
        in_word = max(1, 4 // leaf.dtype.itemsize)
        return 4 * 8 * 128 * -(-rows // (8 * in_word)) * -(-columns // 128)

    constants, carry, x, y = (sum(map(tiled, leaves)) for leaves in shapes)
    return 16 * MIB + constants + 2 * carry + 3 * (x + y)


def tpu(
    step: Callable,
    kernel: Array,
    params: Any,
    carry: tuple[Array, ...],
    inputs: Any,
    rest: Any,
    dtype: Any = None,
    unroll: int = 1,
) -> tuple[tuple[Array, ...], tuple[Array, Any]]:
    """As `bnlstm_jax.implementations.xla`, and likewise without gradients of `rest`.

    The step must close over no arrays, exchange nothing with other devices, and index nothing by
    arrays. `unroll` has no effect.
    """
    del unroll
    operands = dtype or jnp.promote_types(carry[-1].dtype, kernel.dtype)

    def forward_scan(kernel, params, carry, inputs, rest, keep):
        def body(constants, carry, now):
            kernel, params = constants
            recurrent_term = product(carry[-1], kernel, operands)
            after, kept = step(params, carry, recurrent_term, *now, None)
            return after, (after[-1], kept, (carry[:-1], recurrent_term) if keep else None)

        constants = kernel.astype(operands), params
        return kernel_scan(body, constants, carry, (inputs, rest))

    @jax.custom_vjp
    def run(kernel, params, carry, inputs, rest):
        last, (hidden, kept, _) = forward_scan(kernel, params, carry, inputs, rest, False)
        return last, (hidden, kept)

    def forward(kernel, params, carry, inputs, rest):
        last, (hidden, kept, of_steps) = forward_scan(kernel, params, carry, inputs, rest, True)
        before = jnp.concatenate([carry[-1][None], hidden[:-1]])  # what entered each step
        return (last, (hidden, kept)), (kernel, params, inputs, rest, before, kept, of_steps)

    def backward(residuals, gradients):
        kernel, params, inputs, rest, before, kept, (others, recurrent_terms) = residuals
        by_last, (by_hidden, _) = gradients

        def body(constants, state, now):
            kernel, params = constants
            by_carry, by_params = state
            carry, recurrent_term, inputs, rest, kept, by_output = now

            def differentiable(params, carry, recurrent_term, inputs):
                return step(params, carry, recurrent_term, inputs, rest, kept)[0]

            _, pull_back = jax.vjp(differentiable, params, carry, recurrent_term, inputs)
            by_step, by_carry, by_term, by_inputs = pull_back(
                (*by_carry[:-1], by_carry[-1] + by_output)
            )
            by_hidden = jax.lax.dot_general(
                by_term.astype(operands),
                kernel,
                (((1,), (1,)), ((), ())),
                preferred_element_type=by_term.dtype,
            )
            by_carry = (*by_carry[:-1], by_carry[-1] + by_hidden)
            return (by_carry, jax.tree.map(jnp.add, by_params, by_step)), (by_term, by_inputs)

        (by_carry, by_params), (by_terms, by_inputs) = kernel_scan(
            body,
            (kernel.astype(operands), params),
            (by_last, jax.tree.map(jnp.zeros_like, params)),
            ((*others, before), recurrent_terms, inputs, rest, kept, by_hidden),
            reverse=True,
        )
        hidden, by_terms = (x.reshape(-1, x.shape[-1]) for x in (before, by_terms))
        by_kernel = product(hidden.T, by_terms, operands).astype(kernel.dtype)
        return by_kernel, by_params, by_carry, by_inputs, None

    run.defvjp(forward, backward)
    return run(kernel, params, carry, inputs, rest)
