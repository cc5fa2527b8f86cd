"""Finds the non-finite values that an update would introduce."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict


def names(params: Any, batch_stats: Any) -> list[str]:
    """The names of the values that `not_finite` checks; causes come before consequences."""
    statistics, of_params = (sorted(flatten_dict(tree, sep="/")) for tree in (batch_stats, params))
    return [
        *(f"the statistic {name}" for name in statistics),
        "the loss",
        *(f"the gradient of {name}" for name in of_params),
        *(f"the parameter {name}" for name in of_params),
    ]


def not_finite(params: Any, batch_stats: Any, gradients: Any, loss: Any) -> jax.Array:
    """Whether each array has an infinite value or NaN: booleans, in the order of `names`."""
    trees = batch_stats, {"loss": loss}, gradients, params
    values = [value for tree in trees for _, value in sorted(flatten_dict(tree, sep="/").items())]
    return jnp.stack([~jnp.all(jnp.isfinite(value)) for value in values])


def describe(names: list[str], flags: np.ndarray) -> str:
    """A message with the first flagged value, and the number of others."""
    first, *others = [name for name, flag in zip(names, flags, strict=True) if flag]
    return f"{first} would not be finite{f' (and {len(others)} more)' if others else ''}"
