"""Normalisation as pure functions: moments of a batch, batch and layer normalisation.

    BN(x; gamma, beta) = beta + gamma * (x - mean) / sqrt(var + epsilon)                        (5)

Mean and variance are computed in at least float32 whatever the dtype of `x`, in two passes: the
mean first, then the mean squared deviation from it. The one-pass form E[x^2] - E[x]^2 loses all
digits if the deviation is small compared to the mean, as in the first steps of a recurrence.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

T = TypeVar("T")


class Statistics(NamedTuple):
    """Mean and biased variance of one term, each `[..., F]`."""

    mean: Array
    var: Array


class Moments(NamedTuple):
    """Mean and biased variance of a batch; reduced axes stay, with size one.

    Attributes:
      mean, var: the mean and the biased variance.
      rows: number of rows that count, at least one; None for all rows of an unmapped batch.
    """

    mean: Array
    var: Array
    rows: Array | None

    def statistics(self, axis: tuple[int, ...] = (-2,)) -> Statistics:
        """The moments without the reduced axes."""
        return Statistics(jnp.squeeze(self.mean, axis), jnp.squeeze(self.var, axis))


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Which terms of a step are normalised, and how; hashable.

    Attributes:
      terms: names of the normalised terms. The scale of each is the parameter `{term}_scale`.
      kind: `batch`, by batch moments or given statistics; or `layer`, over each row's features.
      epsilon: added to the variance.
      input_epsilon: overrides `epsilon` for the term `input`.
      masked: terms whose moments count only valid rows.
      whole_input: whether moments of the input term are of all time steps together.
      axis_name: mapped axis over which moments are pooled.
      analytic: use the hand-written gradient of `batch_normalize`, which takes less time and
        memory. Else JAX differentiates, also in forward mode and repeatedly.
    """

    terms: tuple[str, ...] = ()
    kind: str = "batch"
    epsilon: float = 1e-5
    input_epsilon: float | None = None
    masked: tuple[str, ...] = ()
    whole_input: bool = False
    axis_name: str | None = None
    analytic: bool = True

    @property
    def batch_terms(self) -> tuple[str, ...]:
        """The terms that have statistics."""
        return self.terms if self.kind == "batch" else ()

    @property
    def pools(self) -> bool:
        """Whether moments are exchanged over a mapped axis."""
        return bool(self.batch_terms) and self.axis_name is not None

    @property
    def counts_padding(self) -> bool:
        """Whether padded inputs count in the moments of the input term."""
        return "input" in self.batch_terms and "input" not in self.masked

    def axis(self, term: str) -> tuple[int, ...]:
        """The axes over which moments of a term `[..., B, F]` are taken."""
        return (-3, -2) if self.whole_input and term == "input" else (-2,)

    def apply(
        self,
        term: str,
        x: Array,
        params: dict[str, Array],
        statistics: dict[str, Statistics] | None = None,
        valid: Array | None = None,
        moments: Moments | None = None,
    ) -> tuple[Array, Moments | None]:
        """Normalises a term: equation 5 without its shift.

        Args:
          term: name of the term.
          x: its values, `[..., B, F]`.
          params: parameters that include the scales.
          statistics: given statistics, by term; None to normalise by the batch's own moments.
          valid: valid rows, boolean `[..., B, 1]`; None if all are valid.
          moments: the batch's moments of the term, if they are known.

        Returns:
          The normalised term, or `x` if the term is not normalised; and the batch moments that
          normalised it, or None.
        """
        if term not in self.terms:
            return x, None
        scale = params[f"{term}_scale"]
        epsilon = self.epsilon
        if term == "input" and self.input_epsilon is not None:
            epsilon = self.input_epsilon
        if self.kind == "layer":
            return layer_normalize(x, scale, epsilon), None
        axis = self.axis(term)
        if statistics is not None:
            return along(x, scale) * standardize(x, statistics[term], epsilon, axis), None
        where = valid if term in self.masked else None
        if not self.analytic:
            moments = batch_moments(x, where, axis, self.axis_name, differentiable=True)
            return _by_moments(x, scale, where, moments, epsilon), moments
        if moments is None:
            moments = batch_moments(x, where, axis, self.axis_name)
        return batch_normalize(x, scale, where, moments, epsilon, axis, self.axis_name), moments


def along(x: Array, features: Array) -> Array:
    """`features` `[F]` with the rank of `x` `[..., F]`, for JAX's strict rank promotion."""
    return jnp.expand_dims(features, tuple(range(x.ndim - 1)))


def statistics_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of statistics and state: float32, or `dtype` if it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def on_any_mesh(function: Callable[..., T], specs: Any, *args: Any) -> T:
    """`function(*args)`; if arguments are sharded over an explicit mesh, XLA shards its operations.

    `specs` is a tree prefix of the result: the `PartitionSpec` of each array on such a mesh.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(args)]
    meshes = [sharding.mesh for sharding in shardings if any(sharding.spec)]
    if not meshes:
        return function(*args)
    places = jax.tree.map(lambda spec: NamedSharding(meshes[0], spec), specs)
    axes = meshes[0].explicit_axes
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=places)(*args)


def varying_alike(tree: T) -> T:
    """Makes arrays vary over the same axes of `shard_map(check_vma=True)`; else changes nothing.

    Hand-written gradients and scans need arrays of one kind. Where a replicated array becomes
    varying, JAX sums its gradient over the axes.
    """

    def axes_of(x: Array) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(axes_of, jax.tree.leaves(tree)))

    def vary(x: Array) -> Array:
        missing = tuple(axes - axes_of(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def standardize(x: Array, statistics: Statistics, epsilon: float, axis: tuple[int, ...]) -> Array:
    """`(x - mean) / sqrt(var + epsilon)`: equation 5 without scale and shift.

    Args:
      x: values, `[..., B, F]`.
      statistics: given statistics, in the shape of `x` without `axis`.
      epsilon: added to the variance.
      axis: the axes that the statistics reduce, as negative numbers.
    """
    mean, var = (jnp.expand_dims(s, axis) for s in statistics)
    return (x - mean) * jax.lax.rsqrt(var + epsilon)


def batch_moments(
    x: Array,
    where: Array | None = None,
    axis: tuple[int, ...] = (-2,),
    axis_name: str | None = None,
    differentiable: bool = False,
) -> Moments:
    """The moments of a batch.

    Args:
      x: values, `[..., B, F]`.
      where: rows that count, boolean `[..., B, 1]`; None for all. If no row counts, mean and
        variance are zero.
      axis: the axes to reduce, as negative numbers.
      axis_name: mapped axis of `vmap`, `pmap` or `shard_map` over which moments are pooled.
      differentiable: whether the moments have a gradient; `batch_normalize` needs none.
    """
    moments = functools.partial(
        _moments, axis=axis, axis_name=axis_name, differentiable=differentiable
    )
    return on_any_mesh(moments, PartitionSpec(), x, where)


def _moments(
    x: Array,
    where: Array | None,
    axis: tuple[int, ...],
    axis_name: str | None,
    differentiable: bool,
) -> Moments:
    values = _counted(x, where)
    if not differentiable:
        values = jax.lax.stop_gradient(values)
    # Moments are computed relative to a row that counts. So the variance loses no digits if the
    # mean is large, and the mean of equal rows, such as the first recurrent term's, is exact.
    origin = jax.lax.stop_gradient(_first_row(values, axis, where))
    count = None
    if where is not None:
        count = jnp.maximum(_total(where.astype(values.dtype), axis), 1)
    rows = _rows(x, axis) if count is None else count
    values = values - origin
    offset = _total(values, axis, where) / rows
    squares = _total(jnp.square(values - offset), axis, where)
    if axis_name is None:
        return Moments(origin + offset, squares / rows, count)

    # Two all-reduces: of means, then of deviations from the pooled mean. The second corrects the
    # rounding error of the first, so that the mean of equal rows stays exact.
    if where is None:
        count = jnp.asarray(rows * jax.lax.psum(1, axis_name), values.dtype)
    else:
        rows = _total(where.astype(values.dtype), axis)
        count = jnp.maximum(jax.lax.psum(rows, axis_name), 1)
    center = jax.lax.psum(rows * (origin + offset), axis_name) / count
    deviation = origin + offset - center
    sums = jnp.concatenate([rows * deviation, squares + rows * jnp.square(deviation)], axis[-1])
    error, var = jnp.split(jax.lax.psum(sums, axis_name) / count, 2, axis[-1])
    return Moments(center + error, jnp.maximum(var - jnp.square(error), 0), count)


def batch_normalize(
    x: Array,
    scale: Array,
    where: Array | None,
    moments: Moments,
    epsilon: float,
    axis: tuple[int, ...] = (-2,),
    axis_name: str | None = None,
) -> Array:
    """Equation 5 without its shift, by the moments that `batch_moments` returns.

    The gradient treats the moments as functions of `x`. It is written by hand: it needs two sums,
    and automatic differentiation of the two passes needs more. Moments can also be residuals while
    the values are recomputed. Only first derivatives in reverse mode are supported.

    Args:
      x, where, axis, axis_name: as in `batch_moments`.
      scale: gamma, `[F]`.
      moments: the moments of `x`.
      epsilon: added to the variance.

    Returns:
      The normalised values, in the shape of `x`, in float32 or wider.
    """
    x, scale, where = varying_alike((x, scale, where))
    normalize = functools.partial(_normalize, epsilon, axis, axis_name)
    return on_any_mesh(normalize, jax.typeof(x).sharding.spec, x, scale, where, moments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalize(
    epsilon: float,
    axis: tuple[int, ...],
    axis_name: str | None,
    x: Array,
    scale: Array,
    where: Array | None,
    moments: Moments,
) -> Array:
    return _by_moments(x, scale, where, moments, epsilon)


def _by_moments(
    x: Array, scale: Array, where: Array | None, moments: Moments, epsilon: float
) -> Array:
    inverse = jax.lax.rsqrt(moments.var + epsilon)
    return along(x, scale) * inverse * (_counted(x, where) - moments.mean)


def _counted(x: Array, where: Array | None) -> Array:
    """`x` in the dtype of statistics, zero in rows that do not count."""
    values = x.astype(statistics_dtype(x.dtype))
    return values if where is None else jnp.where(where, values, 0)


def _rows(x: Array, axis: tuple[int, ...]) -> int:
    return math.prod(x.shape[a] for a in axis)


def _total(x: Array, axis: tuple[int, ...], where: Array | None = None) -> Array:
    """Sum over `axis` of the rows that `where` selects, or of all; `axis` stays with size one."""

    def by_reduction(x: Array) -> Array:
        return jnp.sum(x, axis, where=where, keepdims=True)

    def by_product(x: Array) -> Array:
        return _row_product(jnp.ones((x.shape[-2], 1), bool) if where is None else where, x)

    if axis != (-2,):
        return by_reduction(x)
    # On CPU, XLA's sums of columns take several times as long as this product.
    return jax.lax.platform_dependent(x, cpu=by_product, default=by_reduction)


def _first_row(x: Array, axis: tuple[int, ...], where: Array | None) -> Array:
    """The first row along `axis` that counts, any if none does; `axis` stays with size one."""

    def by_index(x: Array) -> Array:
        counts = where
        for a in axis:
            if counts is None:
                x = jax.lax.slice_in_dim(x, 0, 1, axis=x.ndim + a)
            else:
                first = jnp.argmax(counts, axis=a, keepdims=True)
                x = jnp.take_along_axis(x, first, axis=a)
                counts = jnp.any(counts, axis=a, keepdims=True)
        return x

    if axis != (-2,):
        return by_index(x)
    size = x.shape[-2]
    row = jax.lax.broadcasted_iota(jnp.int32, (1,) * (x.ndim - 2) + (size, 1), x.ndim - 2)
    first: Array | int = 0
    if where is not None:
        first = jnp.min(jnp.where(where, row, size), -2, keepdims=True)

    def by_product(x: Array) -> Array:
        return _row_product(row == first, x)

    def by_sum(x: Array) -> Array:
        return jnp.sum(jnp.where(row == first, x, 0), -2, keepdims=True)

    # With by_index, XLA on CPU reads the row again for each row that it is subtracted from. TPU
    # kernels do not support take_along_axis.
    default = by_index if where is None else by_sum
    return jax.lax.platform_dependent(x, cpu=by_product, default=default)


def _row_product(weights: Array, x: Array) -> Array:
    """Sum of rows with weights `[..., B, 1]`, as a product `[1, B] x [B, F]`."""
    weights = jnp.swapaxes(weights, -1, -2).astype(x.dtype)
    return jnp.matmul(weights, x, precision=jax.lax.Precision.HIGHEST)


def _forward(epsilon, axis, axis_name, x, scale, where, moments):
    y = _normalize(epsilon, axis, axis_name, x, scale, where, moments)
    return y, (x, scale, where, moments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def last_derivative(of: str, x: T) -> T:
    """Identity for hand-written gradients: differentiating it raises an error that names `of`."""
    return x


def _refuse(of, x):
    raise NotImplementedError(
        f"second derivatives of {of} are not defined; in a recurrent layer, set "
        "implementation='reference'"
    )


last_derivative.defvjp(_refuse, lambda of, residuals, gradients: (gradients,))


def _backward(epsilon, axis, axis_name, residuals, d_y):
    x, scale, where, moments = residuals
    inverse = jax.lax.rsqrt(moments.var + epsilon)
    deviation = _counted(x, where) - moments.mean
    d_shift = _total(d_y, axis)
    d_scale = inverse * _total(d_y * deviation, axis)
    d_gamma = d_scale.reshape(-1, scale.shape[-1]).sum(0).astype(scale.dtype)
    if axis_name is not None:  # moments of every shard depend on rows of every shard
        sums = jax.lax.psum(jnp.concatenate([d_shift, d_scale], axis[-1]), axis_name)
        d_shift, d_scale = jnp.split(sums, 2, axis[-1])
    count = _rows(x, axis) if moments.rows is None else moments.rows
    # Derivatives with respect to a row that counts: of the mean, 1 / count; of the variance,
    # 2 (x - mean) / count.
    d_x = d_y - d_shift / count - deviation * (inverse * d_scale / count)
    d_x = along(x, scale) * inverse * d_x
    if where is not None:
        d_x = jnp.where(where, d_x, 0)
    # A second derivative would wrongly treat the moments as constants.
    return *last_derivative("batch normalisation", (d_x.astype(x.dtype), d_gamma)), None, None


_normalize.defvjp(_forward, _backward)


def layer_normalize(x: Array, scale: Array, epsilon: float) -> Array:
    """`scale * (x - mean) / sqrt(var + epsilon)`, with moments over each row's features.

    Ba, Kiros and Hinton (2016), without the shift. `x` `[..., F]` has any floating dtype; the
    result is in float32 or wider.
    """
    x = x.astype(statistics_dtype(x.dtype))
    deviation = x - jnp.mean(x, -1, keepdims=True)
    var = jnp.mean(jnp.square(deviation), -1, keepdims=True)
    return along(x, scale) * jax.lax.rsqrt(var + epsilon) * deviation


def pool_steps(statistics: Statistics, count: Array) -> Statistics:
    """Pools statistics of each time step, `[T, F]`, to those of all time steps together, `[F]`.

    `count` `[T]` is the number of rows at each step. Without any row, the result is zero.
    """
    weight = (count / jnp.maximum(jnp.sum(count), 1)).astype(statistics.mean.dtype)[:, None]
    mean = jnp.sum(weight * statistics.mean, 0)
    deviation = statistics.mean - along(statistics.mean, mean)
    var = jnp.sum(weight * (statistics.var + jnp.square(deviation)), 0)
    return Statistics(mean, var)


def running_average(
    running: Statistics, batch: Statistics, momentum: float, where: Array | None = None
) -> Statistics:
    """`momentum * running + (1 - momentum) * batch` where `where` holds, elsewhere `running`.

    `where` is boolean and broadcasts against the statistics; None is everywhere.
    """

    def average(old: Array, new: Array) -> Array:
        new = momentum * old + (1 - momentum) * new
        return new if where is None else jnp.where(where, new, old)

    return Statistics(*map(average, running, batch))
