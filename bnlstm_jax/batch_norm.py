"""Batch normalisation in Flax modules: the fields and statistics of a module, and a plain layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bnlstm_jax import initializers
from bnlstm_jax.normalization import (
    Moments,
    Statistics,
    batch_moments,
    batch_normalize,
    pool_steps,
    running_average,
    standardize,
    statistics_dtype,
)

# Statistics of the batch at hand, unaveraged, with the number of rows behind each of them.
# Written when an `apply` names it among its mutable collections; see `bnlstm_jax.population`.
CURRENT_BATCH_STATS = "current_batch_stats"


class Normalized(nn.Module):
    """What modules with batch statistics share; the names are those of `flax.linen.BatchNorm`.

    Attributes:
      use_running_average: normalise by the statistics in the collection `batch_stats` (inference)
        rather than by those of the batch (training). Given here or in the call.
      momentum: decay of the running average of batch statistics.
      epsilon: added to the variance.
      axis_name: mapped axis over which batches are pooled for their statistics.
      scale_init: initialiser of the scales (gamma); 0.1 in the paper.
      param_dtype: dtype of the parameters.
    """

    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    scale_init: initializers.Initializer = nn.initializers.constant(0.1)
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def normalized(
        self,
        x: Array,
        scale: Array,
        given: Statistics | None,
        epsilon: float,
        where: Array | None,
        axis: tuple[int, ...],
        moments: Moments | None = None,
    ) -> tuple[Array, Moments | None]:
        """Equation 5 without its shift, by the statistics `given` or, if None, by the batch's own.

        `moments` are those of the batch, where they are known. They are returned.
        """
        if given is not None:
            return scale * standardize(x, given, epsilon, axis), None
        # As in flax.linen.BatchNorm, variables are initialised outside of mapped axes.
        axis_name = None if self.is_initializing() else self.axis_name
        if axis_name is not None and jax.lax.psum(1, axis_name) == 1:
            axis_name = None  # nobody to exchange anything with
        if moments is None:
            moments = batch_moments(x, where, axis, axis_name)
        return batch_normalize(x, scale, where, moments, epsilon, axis, axis_name), moments

    def statistics_variables(self, shape: tuple[int, ...], prefix: str = "") -> list[nn.Variable]:
        """The running mean (from 0) and variance (from 1) of a term, in `batch_stats`."""
        dtype = statistics_dtype(self.param_dtype)
        return [
            self.variable("batch_stats", f"{prefix}mean", jnp.zeros, shape, dtype),
            self.variable("batch_stats", f"{prefix}var", jnp.ones, shape, dtype),
        ]

    def update_statistics(
        self,
        variables: list[nn.Variable],
        batch: Statistics,
        count: Array,
        prefix: str = "",
    ) -> None:
        """Moves running statistics towards those of the batch, and shows the latter to who asks.

        `count` says how many rows are behind them: `[T]` for statistics `[T, F]`, `[]` for `[F]`.
        Where there are none, running statistics stay as they are. Running statistics `[F]` take
        those of all time steps pooled. An initialising module does nothing.
        """
        if self.is_initializing():
            return
        if self.axis_name is not None:
            count = jax.lax.psum(count, self.axis_name)
        running = Statistics(*(v.value for v in variables))
        if batch.mean.ndim > running.mean.ndim:
            batch, count = pool_steps(batch, count), jnp.sum(count)
        reached = (count > 0)[..., None]
        for variable, value in zip(
            variables, running_average(running, batch, self.momentum, reached), strict=True
        ):
            variable.value = value
        if self.is_mutable_collection(CURRENT_BATCH_STATS):
            for name, value in (("mean", batch.mean), ("var", batch.var), ("count", count)):
                self.put_variable(CURRENT_BATCH_STATS, prefix + name, value)


class BatchNorm(Normalized):
    """Batch normalisation of the last axis, over all others; equation 5 without its shift.

    Unlike `flax.linen.BatchNorm` it takes statistics in two passes, and its population statistics
    can be re-estimated by `bnlstm_jax.population`. Parameter `scale [F]`; statistics `mean` and
    `var`, each `[F]`. Under batch statistics only first derivatives in reverse mode are defined;
    the updated statistics have none.
    """

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Values `[..., F]`, normalised.

        Args:
          x: the values.
          use_running_average: overrides the attribute.
          mask: which rows count in statistics, boolean `[..., 1]`; all of them if None.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape, axis = x.shape[-1:], tuple(range(-x.ndim, -1))
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        variables = self.statistics_variables(shape)
        running = Statistics(*(v.value for v in variables)) if use_running_average else None
        rows = jnp.array(x.size // shape[0]) if mask is None else jnp.sum(mask)
        x, moments = self.normalized(x, scale, running, self.epsilon, mask, axis)
        if not use_running_average:
            self.update_statistics(variables, moments.statistics(axis), rows)
        return x
