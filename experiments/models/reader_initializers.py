"""Initial values of the released Attentive Reader."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax import Array

SEED = 123  # with which the released reader seeds its generator anew for each matrix


def orthogonal_blocks(scale: float = 0.05, identical: bool = False) -> Initializer:
    """A kernel `[H, k H]` of k orthogonal `[H, H]` blocks, times `scale`.

    With `identical`, all blocks of one size, in all kernels, are the same matrix for any key; see
    `SEED`. Raises a ValueError for another shape.
    """

    def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32, **kwargs) -> Array:
        rows, columns = shape
        if columns % rows:
            raise ValueError(f"orthogonal_blocks: expected a kernel of shape [H, k H], got {shape}")
        number = columns // rows
        if identical:
            keys = [jax.random.key(SEED)] * number
        else:
            keys = list(jax.random.split(key, number))
        blocks = [nn.initializers.orthogonal()(k, (rows, rows), dtype) for k in keys]
        return scale * jnp.concatenate(blocks, axis=1)

    return init


def uniform(bound: float) -> Initializer:
    """Uniform within `bound` of zero."""

    def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32, **kwargs) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def fan_uniform(identical: bool = False) -> Initializer:
    """A matrix `[n, m]`, uniform within `sqrt(6 / (n + m + 1))` of zero.

    With `identical`, all matrices of one shape are the same for any key, as in `orthogonal_blocks`.
    """

    def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32, **kwargs) -> Array:
        key = jax.random.key(SEED) if identical else key
        return uniform(math.sqrt(6 / (sum(shape) + 1)))(key, shape, dtype)

    return init
