"""Initialisers of the paper's experiments, in the gate order f, i, o, g of `bnlstm_jax.cells`."""

import jax.numpy as jnp
from flax.typing import Initializer
from jax import Array
from jax.nn import initializers


def semi_orthogonal() -> Initializer:
    """A semi-orthogonal matrix: orthonormal rows if it is wide, orthonormal columns if it is tall.

    The rows of a `[H, 4H]` kernel are orthonormal; its `[H, H]` gate blocks are not orthogonal.
    """
    return initializers.orthogonal()


def identity_block() -> Initializer:
    """A recurrent kernel `[H, 4H]`: identity for the candidate g, semi-orthogonal for the gates.

    The three gate blocks f, i, o are one `[H, 3H]` semi-orthogonal matrix. This is the "W_h
    initialised to the identity" of the paper's MNIST experiments. Other shapes raise a ValueError.
    """

    def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32, **kwargs) -> Array:
        features, columns = shape
        if columns != 4 * features:
            raise ValueError(f"identity_block: expected a kernel of shape [H, 4H], got {shape}")
        gates = semi_orthogonal()(key, (features, 3 * features), dtype)
        return jnp.concatenate([gates, jnp.eye(features, dtype=dtype)], axis=1)

    return init


def forget_bias(value: float = 1.0) -> Initializer:
    """A bias `[4H]` that is `value` for the forget gate and zero elsewhere."""

    def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32, **kwargs) -> Array:
        (size,) = shape
        return jnp.zeros(shape, dtype).at[: size // 4].set(value)

    return init
