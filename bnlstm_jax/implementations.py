"""Ways to run a recurrence over time, equal but for rounding.

    reference   a scan of the step, differentiated by JAX
    xla         the same scan with a backward pass that keeps little
    tpu         one kernel for all steps, for TPUs; see `bnlstm_jax.pallas_tpu`
    gpu         one kernel for all steps, for NVIDIA GPUs; see `bnlstm_jax.cuda_gpu`

The first three are made of the step; the last has it written out. `auto` is the one kernel for the
device at hand, where its tests have passed, and `xla` elsewhere.

`xla` keeps of every step the carry that entered it, the product of hidden state and recurrent
kernel, and the moments of normalised terms; all else the backward pass computes anew, by
differentiating the step itself. The gradient of the recurrent kernel, which JAX would add up step
by step, is one product after the backward scan. Only reverse-mode differentiation is defined.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from bnlstm_jax.cells import product
from bnlstm_jax.pallas_tpu import tpu

# (params, carry, recurrent_term, inputs, rest, kept) to (carry, kept): one step, given the product
# of the hidden state, which is the last of the carry, and the recurrent kernel. What it kept when
# it ran forward comes back when it is run again to be differentiated; else that is None.
Step = Callable[[Any, tuple[Array, ...], Array, Any, Any, Any], tuple[tuple[Array, ...], Any]]


def transpose(x: Array) -> Array:
    """`x.T`, to be an operand of a product."""
    if x.dtype != jnp.bfloat16:
        return x.T

    # XLA's bfloat16 product on CPU is fast with both operands in rows, and only then.
    def in_rows(x: Array) -> Array:
        return with_layout_constraint(x.T, Layout((0, 1)))

    return jax.lax.platform_dependent(x, cpu=in_rows, default=jnp.transpose)


def reference(
    step: Step,
    kernel: Array,
    params: Any,
    carry: tuple[Array, ...],
    inputs: Any,
    rest: Any,
    dtype: Any = None,
    unroll: int = 1,
) -> tuple[tuple[Array, ...], tuple[Array, Any]]:
    """Runs `step` over the leading axis of `inputs` and `rest`.

    Args:
      step: one step; see `Step`.
      kernel: the recurrent kernel `[H, F]`.
      params: what else the step has gradients for, in the dtype of statistics.
      carry: the initial carry, arrays `[batch, H]`, the hidden state last.
      inputs: arrays `[time, batch, ...]` with a gradient, or None.
      rest: those without.
      dtype: dtype of the operands of products with the recurrent kernel.
      unroll: time steps per iteration of the compiled loop.

    Returns:
      The last carry, hidden states `[time, batch, H]`, and what was kept, stacked.
    """
    kernel = kernel.astype(dtype or kernel.dtype)

    def body(carry, now):
        carry, kept = step(params, carry, product(carry[-1], kernel, dtype), *now, None)
        return carry, (carry[-1], kept)

    return jax.lax.scan(body, carry, (inputs, rest), unroll=unroll)


def xla(
    step: Step,
    kernel: Array,
    params: Any,
    carry: tuple[Array, ...],
    inputs: Any,
    rest: Any,
    dtype: Any = None,
    unroll: int = 1,
) -> tuple[tuple[Array, ...], tuple[Array, Any]]:
    """As `reference`. What was kept has no gradient, and the step must close over no tracers."""

    @jax.custom_vjp
    def run(kernel, params, carry, inputs, rest):
        return reference(step, kernel, params, carry, inputs, rest, dtype, unroll)

    def forward(kernel, params, carry, inputs, rest):
        operand = kernel.astype(dtype or kernel.dtype)

        def body(carry, now):
            recurrent_term = product(carry[-1], operand, dtype)
            after, kept = step(params, carry, recurrent_term, *now, None)
            return after, (carry, recurrent_term, kept)

        last, (carries, recurrent_terms, kept) = jax.lax.scan(
            body, carry, (inputs, rest), unroll=unroll
        )
        hidden = jnp.concatenate([carries[-1][1:], last[-1][None]])
        residuals = (kernel, params, inputs, rest, carries, recurrent_terms, kept)
        return (last, (hidden, kept)), residuals

    def backward(residuals, gradients):
        kernel, params, inputs, rest, carries, recurrent_terms, kept = residuals
        by_last, (by_hidden, _) = gradients
        steps = by_hidden.shape[0]
        transposed = transpose(kernel.astype(dtype or kernel.dtype))

        # A step's row of `rows` holds its recurrent term until the step is run, then the term's
        # gradient. It is read one step ahead, for XLA copies all of an array that is read and
        # written in one step.
        def body(state, now):
            by_carry, by_params, rows, recurrent_term = state
            t, carry, inputs, rest, kept, by_output = now

            def differentiable(params, carry, recurrent_term, inputs):
                return step(params, carry, recurrent_term, inputs, rest, kept)[0]

            _, pull_back = jax.vjp(differentiable, params, carry, recurrent_term, inputs)
            by_step, by_carry, by_term, by_inputs = pull_back(
                (*by_carry[:-1], by_carry[-1] + by_output)
            )
            by_carry = (*by_carry[:-1], by_carry[-1] + product(by_term, transposed, dtype))
            rows = jax.lax.dynamic_update_index_in_dim(rows, by_term, t, 0)
            ahead = jax.lax.dynamic_index_in_dim(rows, jnp.maximum(t - 1, 0), 0, keepdims=False)
            by_params = jax.tree.map(jnp.add, by_params, by_step)
            return (by_carry, by_params, rows, ahead), by_inputs

        (by_carry, by_params, by_terms, _), by_inputs = jax.lax.scan(
            body,
            (by_last, jax.tree.map(jnp.zeros_like, params), recurrent_terms, recurrent_terms[-1]),
            (jnp.arange(steps), carries, inputs, rest, kept, by_hidden),
            reverse=True,
            unroll=unroll,
        )
        hidden, by_terms = (x.reshape(-1, x.shape[-1]) for x in (carries[-1], by_terms))
        operands = dtype or jnp.promote_types(hidden.dtype, kernel.dtype)
        by_kernel = product(transpose(hidden.astype(operands)), by_terms, dtype)
        return by_kernel.astype(kernel.dtype), by_params, by_carry, by_inputs, None

    run.defvjp(forward, backward)
    return run(kernel, params, carry, inputs, rest)


# All by name, and the platform that one is made for.
IMPLEMENTATIONS = {"xla": None, "reference": None, "tpu": "tpu", "gpu": "gpu"}
# What users may name. `auto` is one of the others; see `choose`.
NAMES = ("auto", *IMPLEMENTATIONS)
# Those that are made of a step.
BY_STEP = {"xla": xla, "reference": reference, "tpu": tpu}
# Hidden units up to which the tests of the one kernel have passed, by kind of device, as JAX names
# it: `auto` takes the kernel for these.
TESTED_UP_TO: dict[str, int] = {"NVIDIA H100 80GB HBM3": 1000}


def default_device() -> jax.Device:
    """The device that programs are for, unless their arrays say otherwise."""
    device = jax.config.jax_default_device
    return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def available() -> list[str]:
    """The implementations for the default device."""
    platforms = None, default_device().platform
    return [name for name, platform in IMPLEMENTATIONS.items() if platform in platforms]


def choose(units: int, refusal: Callable[[str], str | None]) -> str:
    """What `auto` is on the default device, for a number of hidden units; logs which, and why.

    `refusal` says why a layer cannot be run by the one kernel of a name; None if it can.
    """
    kind = default_device().device_kind
    kernels = [name for name in available() if IMPLEMENTATIONS[name] is not None]
    tested = TESTED_UP_TO.get(kind, 0)
    if not kernels:
        why = f"there is no kernel for {kind}"
    elif units > tested:
        why = f"the kernel is tested up to {tested} units on {kind}, and these are {units}"
    else:
        try:
            reason = refusal(kernels[0])
        except (RuntimeError, OSError) as error:  # of a compiler
            log_choice("auto", "xla", str(error), logging.WARNING)
            return "xla"
        if reason is None:
            log_choice("auto", kernels[0], f"tested on {kind}")
            return kernels[0]
        why = f"the kernel {reason}"
    log_choice("auto", "xla", why)
    return "xla"


@functools.cache
def log_choice(name: str, chosen: str, why: str, level: int = logging.INFO) -> None:
    """Tells by what an implementation is run, once, however often a layer is traced."""
    logging.getLogger(__name__).log(level, "implementation %r is %r: %s", name, chosen, why)
