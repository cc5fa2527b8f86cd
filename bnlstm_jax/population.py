"""Population statistics, re-estimated: one plain average of batch statistics over training data.

The running average that training keeps in `batch_stats` trails behind the parameters. The paper's
final numbers use this estimate instead: statistics of whole batches under the final parameters,
averaged with equal weight, for each time step.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnlstm_jax.recurrent import CURRENT_BATCH_STATS


def estimate_population_statistics(
    model: nn.Module,
    variables: dict[str, Any],
    batches: Iterable[Any],
    *,
    rngs: dict[str, jax.Array] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The collection `batch_stats` of `model`, re-estimated from `batches` of training data.

        stats = estimate_population_statistics(model, variables, batches, use_running_average=False)
        y = model.apply({**variables, "batch_stats": stats}, x, use_running_average=True)

    Args:
      model: a module with BNLSTM layers in it, anywhere, each called once. One with an `axis_name`
        is to be cloned without.
      variables: its variables, with the parameters that the statistics are to describe.
      batches: training data; each is the argument of a call of the model, or a tuple of them.
      rngs: keys for the model's random streams, folded with the number of the batch.
      **kwargs: what makes the model use batch statistics, such as `use_running_average=False`.

    Returns:
      `batch_stats` with every statistic of a BNLSTM replaced by its average over the batches that
      reach its time step; steps that none reaches take the statistics of the last one reached.

    Raises:
      ValueError: there are no batches, or no BNLSTM of the model used batch statistics.
    """

    @jax.jit
    def weighted_statistics(variables: Any, index: int, arguments: tuple) -> Any:
        """Statistics of a batch, zero where no row is behind them, and ones where some is."""
        keys = {name: jax.random.fold_in(key, index) for name, key in (rngs or {}).items()}
        mutable = ["batch_stats", CURRENT_BATCH_STATS]
        _, updated = model.apply(variables, *arguments, rngs=keys, mutable=mutable, **kwargs)
        current = flatten_dict(updated.get(CURRENT_BATCH_STATS, {}))
        weighted = {}
        for path, value in current.items():
            if path[-1] != "count":
                reached = _reached(current[(*path[:-1], "count")], value)
                weighted[path] = jnp.where(reached, value, 0), reached.astype(value.dtype)
        return weighted

    totals: dict[tuple[str, ...], Any] = {}
    for index, batch in enumerate(batches):
        arguments = batch if isinstance(batch, tuple) else (batch,)
        weighted = weighted_statistics(variables, index, arguments)
        totals = jax.tree.map(jnp.add, totals, weighted) if totals else weighted
    if not totals:
        raise ValueError(
            "no batch statistics to average: there were no batches, or the model has no BNLSTM "
            "layer, or was called without what makes it use batch statistics, such as "
            "use_running_average=False"
        )
    statistics = flatten_dict(variables["batch_stats"])
    for path, (total, weight) in totals.items():
        average = total / jnp.maximum(weight, 1)
        if total.ndim == 2:
            last = jnp.maximum(jnp.sum(weight > 0) - 1, 0)
            average = average[jnp.minimum(jnp.arange(len(average)), last)]
        statistics[path] = average.astype(statistics[path].dtype)
    return unflatten_dict(statistics)


def _reached(count: jax.Array, statistic: jax.Array) -> jax.Array:
    """Whether a batch's statistic has rows behind it: `[steps, 1]`, or a scalar for `[F]`."""
    return (count > 0)[:, None] if statistic.ndim == 2 else (count > 0).any()
