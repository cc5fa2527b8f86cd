"""Statistics of a Flax module in the collection `batch_stats`, and the plain layer BatchNorm."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bnlstm_jax.initializers import Initializer
from bnlstm_jax.normalization import (
    Statistics,
    along,
    batch_moments,
    batch_normalize,
    pool_steps,
    running_average,
    standardize,
    statistics_dtype,
)

# Collection of the current batch's statistics, `{term}_mean` and `{term}_var`, and their numbers of
# rows, `{term}_count`. `apply` returns it if it is mutable. For `bnlstm_jax.population`, lifted
# transforms must list it beside `batch_stats`.
CURRENT_BATCH_STATS = "current_batch_stats"


class Update(NamedTuple):
    """An update of a running mean or variance.

    Attributes:
      path: path of the statistic in `batch_stats`.
      lifted: whether its module can write `current_batch_stats`.
      timeless: whether the statistic has no time axis. A cell's get theirs from `nn.RNN`.
    """

    path: tuple[str, ...]
    lifted: bool
    timeless: bool


_UPDATES: contextvars.ContextVar[list[Update] | None] = contextvars.ContextVar(
    "updates", default=None
)


@contextlib.contextmanager
def observed_updates() -> Iterator[list[Update]]:
    """Lists the updates of statistics that are traced within the context."""
    updates: list[Update] = []
    token = _UPDATES.set(updates)
    try:
        yield updates
    finally:
        _UPDATES.reset(token)


# For each field, whether a value is valid, and what is expected.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "features": (lambda n: n >= 1, "at least 1"),
    "max_steps": (lambda n: n is None or n >= 1, "at least 1, or None"),
    "vocab_size": (lambda n: n is None or n >= 1, "at least 1, or None"),
    "initial_hidden_noise": (lambda deviation: deviation >= 0, "at least 0"),
    "epsilon": (lambda x: not isinstance(x, Array) and x > 0, "a number above 0"),
    # A schedule gives an array.
    "momentum": (lambda x: isinstance(x, Array) or 0 <= x <= 1, "a number from 0 to 1"),
    "dtype": (
        lambda dtype: dtype is None or jnp.issubdtype(dtype, jnp.floating),
        "a floating-point dtype, or None",
    ),
}


def check_fields(module: nn.Module) -> None:
    """Raises a ValueError that names a field of a module whose value is out of range."""
    for field, (is_valid, expected) in _FIELDS.items():
        if hasattr(module, field) and not is_valid(value := getattr(module, field)):
            raise ValueError(f"{field}: expected {expected}, got {value!r}")


def check_rows(module: nn.Module, rows: int) -> None:
    """Raises a ValueError if batch statistics would be taken over a single row.

    `rows` is this device's number of rows. One is enough to initialise a module, or if statistics
    are pooled over several devices.
    """
    if rows == 1 and not module.is_initializing() and pooled_axis(module) is None:
        raise ValueError(
            f"{type(module).__name__}: expected a batch of at least 2 under batch statistics, got "
            "1; drop a last batch of one example, or pass use_running_average=True to normalise by "
            "running statistics"
        )


def normalizes_by_running(module: nn.Module, argument: bool | None) -> bool:
    """Whether a module normalises by running statistics, by its field or the argument of a call.

    Raises:
      TypeError: the value is not a boolean, such as lengths or a mask by position, or is traced.
      ValueError: both or neither are given.
    """
    refuse_arrays(module, argument)
    value = nn.merge_param("use_running_average", module.use_running_average, argument)
    refuse_arrays(module, value)
    if not isinstance(value, bool) and getattr(value, "dtype", None) != jnp.bool_:
        raise TypeError(_not_boolean(module, value))
    try:
        return bool(value)
    except jax.errors.TracerBoolConversionError:
        hint = "; make it static, by jax.jit's static_argnames, or set the field, as under nn.remat"
        raise TypeError(_not_boolean(module, value) + hint) from None


def refuse_arrays(module: nn.Module, use_running_average: Any) -> None:
    """Raises a TypeError if `use_running_average` is an array or a list, as lengths by position."""
    if isinstance(use_running_average, list | tuple) or getattr(use_running_average, "ndim", 0) > 0:
        hint = "; pass lengths and masks by keyword"
        raise TypeError(_not_boolean(module, use_running_average) + hint)


def _not_boolean(module: nn.Module, value: Any) -> str:
    got = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)[:40]
    owner = type(module).__name__
    return f"{owner}: use_running_average: expected True or False, got {got}"


def pooled_axis(module: nn.Module, use_running_average: bool = False) -> str | None:
    """The `axis_name` of a module, or None where there is nothing to pool.

    As in `flax.linen.BatchNorm`, initialisation and inference need no mapped axis.
    """
    if use_running_average or module.is_initializing() or module.axis_name is None:
        return None
    return None if jax.lax.psum(1, module.axis_name) == 1 else module.axis_name


def running_statistics(module: nn.Module, shape: tuple[int, ...], prefix: str = "") -> Statistics:
    """The running mean (initially 0) and variance (initially 1) of a term, in `batch_stats`.

    Raises:
      ValueError: `batch_stats` lacks them, or they have another shape.
    """
    dtype = statistics_dtype(module.param_dtype)
    owner, values = type(module).__name__, []
    for name, init in ((f"{prefix}mean", jnp.zeros), (f"{prefix}var", jnp.ones)):
        missing = not module.has_variable("batch_stats", name)
        if missing and not module.is_mutable_collection("batch_stats"):
            raise ValueError(
                f"{owner}: the variables have no batch_stats/{name}; a lifted transform, such as "
                "nn.RNN or nn.scan, must list the collections: "
                f"variable_axes={{'batch_stats': 0, '{CURRENT_BATCH_STATS}': 0}}"
            )
        value = module.variable("batch_stats", name, init, shape, dtype).value
        if value.shape != shape:
            expected = f"expected batch_stats/{name} of the shape {list(shape)}"
            raise ValueError(f"{owner}: {expected}, got {list(value.shape)}")
        values.append(value)
    return Statistics(*values)


def update_statistics(
    module: nn.Module, running: Statistics, batch: Statistics, count: Array, prefix: str = ""
) -> None:
    """Updates running statistics with batch statistics; adds these to `current_batch_stats`.

    Args:
      module: has `momentum` and `axis_name`. Nothing changes while it is initialised.
      running: the running statistics, `[T, F]` or `[F]`.
      batch: batch statistics. `[T, F]` is pooled over time if running statistics are `[F]`.
      count: this device's number of rows, `[T]` or `[]`. Statistics of fewer than two rows over all
        devices are ignored: one row has no variance.
      prefix: prefix of the names in both collections.
    """
    if module.is_initializing():
        return
    lifted = module.is_mutable_collection(CURRENT_BATCH_STATS)
    if (updates := _UPDATES.get()) is not None:
        timeless = running.mean.ndim == 1 and not isinstance(module, nn.RNNCellBase)
        paths = [(*module.path, prefix + name) for name in Statistics._fields]
        updates.extend(Update(path, lifted, timeless) for path in paths)
    if module.axis_name is not None:
        count = jax.lax.psum(count, module.axis_name)
        if pooled_axis(module) is None:  # marks statistics as equal along an axis of one device
            batch = jax.lax.psum(batch, module.axis_name)
    batch = jax.lax.stop_gradient(batch)
    if batch.mean.ndim > running.mean.ndim:
        batch, count = pool_steps(batch, count), jnp.sum(count)
    count = jnp.where(count > 1, count, 0)
    reached = (count > 0)[..., None]
    averages = running_average(running, batch, module.momentum, reached)
    for name, old, average in zip(Statistics._fields, running, averages, strict=True):
        boxed: Any = module.get_variable("batch_stats", prefix + name)
        average = nn.meta.replace_boxed(boxed, average.astype(old.dtype))
        module.put_variable("batch_stats", prefix + name, average)
    if lifted:
        _add_to_current(module, batch, count, prefix)


def _add_to_current(module: nn.Module, batch: Statistics, count: Array, prefix: str) -> None:
    """Averages `batch` with earlier calls in `current_batch_stats`, weighted by numbers of rows.

    Variances are averaged like means, as in running averages: each call normalises by its own.
    """

    def earlier(name: str, like: Array) -> Array:
        return module.get_variable(CURRENT_BATCH_STATS, prefix + name, jnp.zeros_like(like))

    total = earlier("count", count) + count
    share = (count / jnp.maximum(total, 1)).astype(batch.mean.dtype)[..., None]
    for name, new in zip(Statistics._fields, batch, strict=True):
        old = earlier(name, new)
        module.put_variable(CURRENT_BATCH_STATS, prefix + name, old + share * (new - old))
    module.put_variable(CURRENT_BATCH_STATS, f"{prefix}count", total)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last: equation 5 without its shift.

    The parameter is `scale [F]`. The collection `batch_stats` holds the running statistics `mean`
    and `var`, each `[F]`. `bnlstm_jax.estimate_population_statistics` re-estimates them.

    Unlike `flax.linen.BatchNorm`, it has no bias, and its scale starts at 0.1. Statistics are
    computed in two passes, as with `use_fast_variance=False`. A batch of one row raises. The mask
    is of whole rows, and masked rows are set to zero. Under batch statistics, only first
    derivatives in reverse mode are supported. Updated statistics have no gradient.

    Attributes:
      use_running_average: if True, normalise by `batch_stats` (inference), else by the batch's own
        moments (training). Set it here or in the call.
      momentum: decay rate of the running averages.
      epsilon: added to the variance.
      axis_name: axis of `vmap`, `pmap` or `shard_map` over which batch statistics are pooled.
      scale_init: initialiser of the scale (gamma); 0.1 in the paper.
      dtype: dtype of the output; by default the promoted dtype of `x` and the scale, float32 or
        wider.
      param_dtype: dtype of the scale. Statistics are in float32 or wider.
    """

    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    scale_init: Initializer = nn.initializers.constant(0.1)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalises `x` over all axes but the last.

        Args:
          x: values, `[..., F]`.
          use_running_average: as the attribute; set exactly one of the two.
          mask: rows that count in batch statistics, boolean, broadcastable to `[..., 1]`; None for
            all rows. In training, values of the other rows are replaced by zero and have no
            gradient: padding may hold anything, NaN included.

        Returns:
          The normalised values, in the shape of `x`.

        Raises:
          TypeError: `use_running_average` is not a boolean.
          ValueError: a field is out of range, `use_running_average` is set twice or never, `mask`
            is not boolean or has another rank than `x`, or the batch has one row under batch
            statistics.
        """
        use_running_average = normalizes_by_running(self, use_running_average)
        check_fields(self)
        features, axis = x.shape[-1:], tuple(range(-x.ndim, -1))
        scale = self.param("scale", self.scale_init, features, self.param_dtype)
        running = running_statistics(self, features)
        if use_running_average:
            y = along(x, scale) * standardize(x, running, self.epsilon, axis)
            return y.astype(self.dtype or y.dtype)
        if mask is not None:
            mask = jnp.asarray(mask)
            if mask.ndim != x.ndim or mask.dtype != bool:
                got = f"{mask.dtype}{list(mask.shape)}"
                raise ValueError(f"mask: expected booleans with {x.ndim} axes, got {got}")
            mask = jnp.broadcast_to(mask, (*x.shape[:-1], 1))
        check_rows(self, x.size // features[0])
        axis_name = pooled_axis(self)
        moments = batch_moments(x, mask, axis, axis_name)
        rows = jnp.array(x.size // features[0]) if mask is None else jnp.sum(mask)
        update_statistics(self, running, moments.statistics(axis), rows)
        y = batch_normalize(x, scale, mask, moments, self.epsilon, axis, axis_name)
        return y.astype(self.dtype or y.dtype)
