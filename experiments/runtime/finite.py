"""Non-finite values: which of the values that an update would bring in are not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict


def watched(params: Any, batch_stats: Any, gradients: Any, loss: Any) -> dict[str, Any]:
    """The values to check, by their names in messages; causes come before consequences."""
    named = {}
    for kind, tree in (("statistic", batch_stats), ("gradient of", gradients)):
        named |= {f"the {kind} {k}": v for k, v in flatten_dict(tree, sep="/").items()}
        if kind == "statistic":
            named["the loss"] = loss
    return named | {f"the parameter {k}": v for k, v in flatten_dict(params, sep="/").items()}


def not_finite(named: dict[str, Any]) -> jax.Array:
    """Whether each array holds a value that is infinite or NaN, boolean `[len(named)]`."""
    return jnp.stack([~jnp.all(jnp.isfinite(value)) for value in named.values()])


def describe(named: dict[str, Any], flags: np.ndarray) -> str:
    """The first of the arrays flagged, and how many more there are."""
    first, *others = [name for name, flag in zip(named, flags, strict=True) if flag]
    return f"{first} would not be finite{f' (and {len(others)} more)' if others else ''}"
