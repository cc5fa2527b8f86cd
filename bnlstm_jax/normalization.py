"""Normalisation as a pure transform: moments of a batch, batch and layer normalisation.

    BN(x; gamma, beta) = beta + gamma * (x - mean) / sqrt(var + epsilon)                        (5)

Mean and variance are taken in at least float32 whatever the dtype of `x`, and in two passes: the
mean first, then the mean squared deviation from it. The one-pass form E[x^2] - E[x]^2 loses every
digit where the spread is small against the mean, as it is in the first steps of a recurrence.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Statistics(NamedTuple):
    """Mean and biased variance of one term, each `[..., F]`."""

    mean: Array
    var: Array


class Moments(NamedTuple):
    """Statistics of a batch as they normalise it: with the axes they were taken over, of size one.

    Attributes:
      mean, var: the mean and the biased variance.
      count: how many rows count, at least one; None for all, where no axis is mapped.
    """

    mean: Array
    var: Array
    count: Array | None

    def statistics(self, axis: tuple[int, ...]) -> Statistics:
        """Without those axes."""
        return Statistics(jnp.squeeze(self.mean, axis), jnp.squeeze(self.var, axis))


def statistics_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which statistics and state are kept: float32, or wider if `dtype` is."""
    return jnp.promote_types(dtype, jnp.float32)


def standardize(x: Array, statistics: Statistics, epsilon: float, axis: tuple[int, ...]) -> Array:
    """`(x - mean) / sqrt(var + epsilon)`, which is equation 5 without scale and shift.

    Args:
      x: values, `[..., batch, F]`.
      statistics: given ones, `[..., F]`: the shape of `x` without `axis`.
      epsilon: added to the variance.
      axis: the axes over which statistics are taken, negative numbers.
    """
    mean, var = (jnp.expand_dims(s, axis) for s in statistics)
    return (x - mean) * jax.lax.rsqrt(var + epsilon)


def batch_moments(
    x: Array,
    where: Array | None = None,
    axis: tuple[int, ...] = (-2,),
    axis_name: str | None = None,
) -> Moments:
    """The moments of a batch, for `batch_normalize`. No gradient flows through them here.

    Args:
      x: values, `[..., batch, F]`.
      where: which rows count, boolean `[..., batch, 1]`; all of them if None. The others are taken
        for zeros. Where no row counts, mean and variance are zero.
      axis: the axes over which statistics are taken, negative numbers.
      axis_name: mapped axis of `vmap`, `pmap` or `shard_map(check_vma=False)`, over which rows are
        pooled too.
    """
    values = jax.lax.stop_gradient(_counted(x, where))
    # Measured from a row that counts, the variance loses no digits to the batch's distance from
    # zero, and the mean of equal rows is exactly each of them: such is the first recurrent term,
    # the same in all examples.
    origin = _first_row(values, axis, where)
    count = None
    if where is not None:
        count = jnp.maximum(_total(where.astype(values.dtype), axis), 1)
    rows = _rows(x, axis) if count is None else count
    values = values - origin
    offset = _total(values, axis, where) / rows
    squares = _total(jnp.square(values - offset), axis, where)
    if axis_name is None:
        return Moments(origin + offset, squares / rows, count)

    # Pooled in two exchanges: of means, and of deviations from their mean. The latter tell how far
    # rounding has put it off, too, so that equal rows still have exactly their mean.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def batch_normalize(
    x: Array,
    scale: Array,
    where: Array | None,
    moments: Moments,
    epsilon: float,
    axis: tuple[int, ...] = (-2,),
    axis_name: str | None = None,
) -> Array:
    """Equation 5 without its shift, by the batch's own moments: those that `batch_moments` gave.

    Gradients flow through the moments as functions of `x`. They are written out below, because the
    well-known short form needs two sums where automatic differentiation of the two passes needs
    several, and because moments can be kept where the values are computed anew. Only reverse-mode
    differentiation is defined, and only once.

    Args:
      x, where, axis, axis_name: as for `batch_moments`.
      scale: gamma, `[F]`.
      moments: those of `x`.
      epsilon: added to the variance.

    Returns:
      The normalised values, in the shape of `x`, in float32 or wider.
    """
    return scale * jax.lax.rsqrt(moments.var + epsilon) * (_counted(x, where) - moments.mean)


def _counted(x: Array, where: Array | None) -> Array:
    """In the dtype of statistics, with zeros for whatever padding holds."""
    values = x.astype(statistics_dtype(x.dtype))
    return values if where is None else jnp.where(where, values, 0)


def _rows(x: Array, axis: tuple[int, ...]) -> int:
    return math.prod(x.shape[a] for a in axis)


def _total(x: Array, axis: tuple[int, ...], where: Array | None = None) -> Array:
    """Sum over `axis`, which stays with size one; of the rows `where`, if given."""

    def by_reduction(x: Array) -> Array:
        return jnp.sum(x, axis, where=where, keepdims=True)

    def by_product(x: Array) -> Array:
        return _row_product(jnp.ones((x.shape[-2], 1), bool) if where is None else where, x)

    if axis != (-2,):
        return by_reduction(x)
    # XLA's sums of columns on CPU take several times as long as this product.
    return jax.lax.platform_dependent(x, cpu=by_product, default=by_reduction)


def _first_row(x: Array, axis: tuple[int, ...], where: Array | None) -> Array:
    """The first row along `axis`, which stays with size one, that counts; any if none does."""

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
    row = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    first = 0
    if where is not None:
        first = jnp.min(jnp.where(where, row, size), -2, keepdims=True)

    def by_product(x: Array) -> Array:
        return _row_product(row == first, x)

    def by_sum(x: Array) -> Array:
        return jnp.sum(jnp.where(row == first, x, 0), -2, keepdims=True)

    # XLA on CPU would take the row out of `x` anew for each of the rows it is subtracted from. A
    # TPU kernel has no take_along_axis.
    default = by_index if where is None else by_sum
    return jax.lax.platform_dependent(x, cpu=by_product, default=default)


def _row_product(weights: Array, x: Array) -> Array:
    """The sum of rows with weights `[..., batch, 1]`, by a product `[1, batch] x [batch, F]`."""
    weights = jnp.swapaxes(weights, -1, -2).astype(x.dtype)
    return jnp.matmul(weights, x, precision=jax.lax.Precision.HIGHEST)


def _forward(x, scale, where, moments, epsilon, axis, axis_name):
    y = batch_normalize(x, scale, where, moments, epsilon, axis, axis_name)
    return y, (x, scale, where, moments)


@jax.custom_vjp
def _last_derivative(x: tuple[Array, Array]) -> tuple[Array, Array]:
    """Refuses to be differentiated: the moments behind it would count as constants."""
    return x


def _refuse(x):
    raise NotImplementedError("second derivatives of batch normalisation are not defined")


_last_derivative.defvjp(_refuse, lambda residuals, gradients: (gradients,))


def _backward(epsilon, axis, axis_name, residuals, by_y):
    x, scale, where, moments = residuals
    inverse = jax.lax.rsqrt(moments.var + epsilon)
    deviation = _counted(x, where) - moments.mean
    by_shift = _total(by_y, axis)
    by_scale = inverse * _total(by_y * deviation, axis)
    gradient = by_scale.reshape(-1, scale.shape[-1]).sum(0).astype(scale.dtype)
    if axis_name is not None:  # every shard's moments depend on every shard's rows
        sums = jax.lax.psum(jnp.concatenate([by_shift, by_scale], axis[-1]), axis_name)
        by_shift, by_scale = jnp.split(sums, 2, axis[-1])
    count = _rows(x, axis) if moments.count is None else moments.count
    # A row that counts moves the mean by 1 / count and the variance by 2 (x - mean) / count.
    by_x = by_y - by_shift / count - deviation * (inverse * by_scale / count)
    by_x = scale * inverse * by_x
    if where is not None:
        by_x = jnp.where(where, by_x, 0)
    by_x, gradient = _last_derivative((by_x.astype(x.dtype), gradient))
    return by_x, gradient, None, None


batch_normalize.defvjp(_forward, _backward)


def layer_normalize(x: Array, scale: Array, epsilon: float) -> Array:
    """`scale * (x - mean) / sqrt(var + epsilon)` of each row by itself, over its features.

    Values `[..., F]` in any floating dtype; the result is in float32 or wider. Ba, Kiros and Hinton
    (2016), without the shift.
    """
    x = x.astype(statistics_dtype(x.dtype))
    deviation = x - jnp.mean(x, -1, keepdims=True)
    var = jnp.mean(jnp.square(deviation), -1, keepdims=True)
    return scale * jax.lax.rsqrt(var + epsilon) * deviation


def pool_steps(statistics: Statistics, count: Array) -> Statistics:
    """Mean and variance `[F]` of the rows of all time steps together.

    Of the statistics of each, `[T, F]`, with `count` rows behind them, `[T]`. Zeros if all are 0.
    """
    weight = (count / jnp.maximum(jnp.sum(count), 1))[:, None]
    mean = jnp.sum(weight * statistics.mean, 0)
    var = jnp.sum(weight * (statistics.var + jnp.square(statistics.mean - mean)), 0)
    return Statistics(mean, var)


def running_average(
    running: Statistics, batch: Statistics, momentum: float, where: Array | None = None
) -> Statistics:
    """`momentum * running + (1 - momentum) * batch`, only `where` the batch has something to say.

    `where` is boolean and broadcasts against the statistics; None stands for everywhere.
    """

    def average(old: Array, new: Array) -> Array:
        new = momentum * old + (1 - momentum) * new
        return new if where is None else jnp.where(where, new, old)

    return Statistics(*map(average, running, batch))
