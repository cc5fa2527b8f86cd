"""Batch normalisation as a pure transform: statistics of a batch, standardisation, running average.

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


def statistics_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which statistics and state are kept: float32, or wider if `dtype` is."""
    return jnp.promote_types(dtype, jnp.float32)


def standardize(x: Array, statistics: Statistics, epsilon: float, axis: tuple[int, ...]) -> Array:
    """`(x - mean) / sqrt(var + epsilon)`, which is equation 5 without scale and shift.

    Args:
      x: values, `[..., batch, F]`.
      statistics: those of `x` or others, `[..., F]`: the shape of `x` without `axis`.
      epsilon: added to the variance.
      axis: the axes over which statistics are taken, negative numbers.
    """
    mean, var = (jnp.expand_dims(s, axis) for s in statistics)
    return (x - mean) * jax.lax.rsqrt(var + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def batch_standardize(
    x: Array,
    where: Array | None,
    epsilon: float,
    axis: tuple[int, ...] = (-2,),
    axis_name: str | None = None,
) -> tuple[Array, Statistics]:
    """Standardises `x` by its own statistics, and gives both.

    Gradients flow through the statistics. They are written out below, because the well-known short
    form needs one stored array and two reductions where automatic differentiation of the two
    passes needs several of each. Only reverse-mode differentiation is defined.

    Args:
      x: values, `[..., batch, F]`.
      where: which rows count, boolean `[..., batch, 1]`; all of them if None. The others are taken
        for zeros. Where no row counts, mean and variance are zero, and all stays finite.
      epsilon: added to the variance.
      axis: the axes over which statistics are taken, negative numbers.
      axis_name: mapped axis of `vmap`, `pmap` or `shard_map(check_vma=False)`, over which rows are
        pooled too.

    Returns:
      The standardised values, in the shape of `x`, and the statistics, `[..., F]`; all of them in
      float32 or wider.
    """
    return _forward(x, where, epsilon, axis, axis_name)[0]


def _total(x: Array, where: Array | None, axis: tuple[int, ...], axis_name: str | None) -> Array:
    total = jnp.sum(x, axis, where=where, keepdims=True)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _forward(x, where, epsilon, axis, axis_name):
    dtype = statistics_dtype(x.dtype)
    values = x.astype(dtype)
    if where is None:
        count = math.prod(x.shape[a] for a in axis)
        count = count if axis_name is None else count * jax.lax.psum(1, axis_name)
    else:
        values = jnp.where(where, values, 0)  # whatever padding holds
        count = jnp.maximum(_total(where.astype(dtype), None, axis, axis_name), 1)
    # Measured from a row that counts, a batch loses no digits to its distance from zero, and equal
    # rows have exactly zero deviation: such is the first recurrent term, the same in all examples.
    origin, counts = values, where
    for a in axis:
        if counts is None:
            origin = jax.lax.slice_in_dim(origin, 0, 1, axis=x.ndim + a)
        else:
            first = jnp.argmax(counts, axis=a, keepdims=True)
            origin = jnp.take_along_axis(origin, first, axis=a)
            counts = jnp.any(counts, axis=a, keepdims=True)
    if axis_name is not None:
        origin = jax.lax.pmean(origin, axis_name)
    values = values - origin
    mean = _total(values, where, axis, axis_name) / count
    deviation = values - mean
    var = _total(jnp.square(deviation), where, axis, axis_name) / count
    statistics = Statistics(jnp.squeeze(origin + mean, axis), jnp.squeeze(var, axis))
    if axis_name is not None:  # a copy for each shard, with a gradient of its own, under vmap too
        zero = 0 * jax.lax.axis_index(axis_name).astype(dtype)
        statistics = Statistics(*(s + zero for s in statistics))
    standardized = deviation * jax.lax.rsqrt(var + epsilon)
    like_x = jnp.zeros((), x.dtype)
    return (standardized, statistics), (standardized, var, count, where, like_x)


def _backward(epsilon, axis, axis_name, residuals, gradients):
    standardized, var, count, where, like_x = residuals
    by_values, (by_mean, by_var) = gradients
    scale = jax.lax.rsqrt(var + epsilon)
    by_mean, by_var = (jnp.expand_dims(g, axis) for g in (by_mean, by_var))
    if axis_name is not None:  # every shard's statistics depend on every shard's rows
        by_mean, by_var = jax.lax.psum((by_mean, by_var), axis_name)

    def total(x):
        return _total(x, None, axis, axis_name)

    by_mean = by_mean - scale * total(by_values)
    by_var = by_var - scale**2 / 2 * total(by_values * standardized)
    # A row that counts moves the mean by 1 / count and the variance by 2 (x - mean) / count.
    by_x = scale * by_values + (by_mean + 2 * by_var * standardized / scale) / count
    if where is not None:
        by_x = jnp.where(where, by_x, 0)
    return by_x.astype(like_x.dtype), None


batch_standardize.defvjp(_forward, _backward)


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
