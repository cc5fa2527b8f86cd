"""Population statistics, re-estimated: the mean of batch statistics over training data.

The running averages that training keeps in `batch_stats` lag behind the parameters. The paper's
final numbers use this estimate instead: statistics of whole batches under the final parameters,
averaged with equal weight, for each time step.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnlstm_jax.batch_norm import CURRENT_BATCH_STATS


def estimate_population_statistics(
    model: nn.Module,
    variables: dict[str, Any],
    batches: Iterable[Any],
    *,
    rngs: dict[str, jax.Array] | None = None,
    late_steps: str = "skip",
    inputs: Callable[[Any], tuple] | None = None,
    transform: Callable[[Callable], Callable] = jax.jit,
    **kwargs: Any,
) -> dict[str, Any]:
    """The collection `batch_stats` of `model`, re-estimated from `batches` of training data.

        stats = estimate_population_statistics(model, variables, batches, use_running_average=False)
        y = model.apply({**variables, "batch_stats": stats}, x, use_running_average=True)

    Args:
      model: a module with BNLSTM or BatchNorm layers anywhere, each called once.
      variables: its variables, with the parameters to estimate statistics for.
      batches: training data; each batch is the argument of a call of the model, or a tuple of them.
      rngs: keys of the model's random streams, folded with the number of the batch.
      late_steps: what a batch of shorter sequences contributes to time steps that it does not
        reach: `skip`, nothing; `repeat`, the statistics of its last step, as in the released
        reader.
      inputs: maps a batch to a tuple of arguments of the model, if it is not one already.
      transform: compiles a function of variables, the number of a batch, and the batch. For a model
        with an `axis_name` it also maps that axis.
      **kwargs: arguments that make the model use batch statistics, such as
        `use_running_average=False`.

    Returns:
      `batch_stats`, with every statistic of those layers replaced by its average over the batches
      that reach its time step. Steps that no batch reaches take the statistics of the last step
      that one does.

    Raises:
      ValueError: there are no batches, no layer used batch statistics, or `late_steps` is unknown.
    """
    if late_steps not in ("skip", "repeat"):
        raise ValueError(f"late_steps: expected 'skip' or 'repeat', got {late_steps!r}")

    def weighted_statistics(variables: Any, index: int, batch: Any) -> Any:
        """Statistics of a batch, and one where rows are behind them; both zero elsewhere."""
        if inputs is not None:
            arguments = inputs(batch)
        else:
            arguments = batch if isinstance(batch, tuple) else (batch,)
        keys = {name: jax.random.fold_in(key, index) for name, key in (rngs or {}).items()}
        mutable = ["batch_stats", CURRENT_BATCH_STATS]
        _, updated = model.apply(variables, *arguments, rngs=keys, mutable=mutable, **kwargs)
        current = flatten_dict(updated.get(CURRENT_BATCH_STATS, {}))
        weighted = {}
        for path, value in current.items():
            prefix, kind = re.fullmatch("(.*)(mean|var|count)", path[-1]).groups()
            if kind != "count":
                reached = current[(*path[:-1], f"{prefix}count")][..., None] > 0
                if late_steps == "repeat":
                    value = _repeat_last(value, reached)
                    reached = jnp.full_like(reached, jnp.any(reached))
                weighted[path] = jnp.where(reached, value, 0), reached.astype(value.dtype)
        return weighted

    compiled = transform(weighted_statistics)
    totals: dict[tuple[str, ...], Any] = {}
    for index, batch in enumerate(batches):
        weighted = compiled(variables, index, batch)
        totals = jax.tree.map(jnp.add, totals, weighted) if totals else weighted
    if not totals:
        raise ValueError(
            "no batch statistics to average: there are no batches, or no layer of the model has "
            "statistics, or an argument such as use_running_average=False is missing"
        )
    statistics = flatten_dict(variables["batch_stats"])
    for path, (total, weight) in totals.items():
        average = _repeat_last(total / jnp.maximum(weight, 1), weight > 0)
        statistics[path] = average.astype(statistics[path].dtype)
    return unflatten_dict(statistics)


def _repeat_last(statistic: jax.Array, reached: jax.Array) -> jax.Array:
    """Time steps after the last one `reached`, `[T, 1]`, take its statistics `[T, F]`."""
    if statistic.ndim == 1:  # of all time steps together
        return statistic
    last = jnp.maximum(jnp.sum(reached) - 1, 0)
    return statistic[jnp.minimum(jnp.arange(len(statistic)), last)]
