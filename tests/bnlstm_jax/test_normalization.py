import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bnlstm_jax.normalization import (
    Statistics,
    batch_moments,
    batch_normalize,
    running_average,
    standardize,
)

EPSILON = 1e-5


@pytest.fixture(autouse=True, params=["cpu", "default"])
def platform(request, monkeypatch):
    """Also runs the branches that JAX takes on GPUs and TPUs."""
    if request.param == "default":

        def platform_dependent(*arguments, default, **_):
            return default(*arguments)

        monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)


def by_own_moments(x, where, epsilon, axis=(-2,), axis_name=None, scale=None):
    """The values normalised by their own moments, and the statistics."""
    scale = jnp.ones(x.shape[-1]) if scale is None else scale
    moments = batch_moments(x, where, axis, axis_name)
    normalized = batch_normalize(x, scale, where, moments, epsilon, axis, axis_name)
    return normalized, moments.statistics(axis)


def two_passes(x, where, epsilon, axis=(-2,)):
    """The same without a hand-written gradient: what automatic differentiation makes of it."""
    if where is not None:
        x = jnp.where(where, x, 0)
    weight = jnp.ones_like(x) if where is None else jnp.broadcast_to(where, x.shape).astype(x.dtype)
    count = jnp.maximum(weight.sum(axis), 1)
    mean = (weight * x).sum(axis) / count
    deviation = x - jnp.expand_dims(mean, axis)
    statistics = Statistics(mean, (weight * deviation**2).sum(axis) / count)
    return standardize(x, statistics, epsilon, axis), statistics


@pytest.mark.parametrize("axis", [(-2,), (-3, -2)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_matches_automatic_differentiation(axis, masked):
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        x = jnp.asarray(random.normal(size=(3, 5, 4)) + 2)
        where = jnp.asarray(random.random((3, 5, 1)) < 0.6) if masked else None
        weights, scale = jnp.asarray(random.normal(size=x.shape)), jnp.asarray([0.5, 2, -1, 0.1])

        def by_hand(x, scale):
            return jnp.vdot(weights, by_own_moments(x, where, EPSILON, axis, None, scale)[0])

        def automatic(x, scale):
            return jnp.vdot(weights, scale * two_passes(x, where, EPSILON, axis)[0])

        got, wanted = (
            jax.value_and_grad(function, argnums=(0, 1))(x, scale)
            for function in (by_hand, automatic)
        )
        # Float64 through at most a dozen operations; values are of order 1.
        np.testing.assert_allclose(got[0], wanted[0], rtol=1e-11)
        for a, b in zip(got[1], wanted[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        for a, b in zip(
            batch_moments(x, where, axis).statistics(axis),
            two_passes(x, where, EPSILON, axis)[1],
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_pooled_shards_match_the_whole_batch(masked):
    with jax.enable_x64(True):
        random = np.random.default_rng(5)
        x, weights = (jnp.asarray(random.normal(size=(2, 4, 3))) for _ in range(2))
        scale = jnp.asarray([0.5, 2, -1])
        where = jnp.asarray([[1, 0, 0, 0], [1, 1, 0, 1]], bool)[..., None] if masked else None

        def value(x, scale, where, weights, axis_name=None):
            outputs = by_own_moments(x, where, EPSILON, (-2,), axis_name, scale)
            return jnp.vdot(weights, outputs[0]), outputs[1]

        def sharded(x, scale):
            shard = functools.partial(value, axis_name="shards")
            values, statistics = jax.vmap(shard, in_axes=(0, None, 0, 0), axis_name="shards")(
                x, scale, where, weights
            )
            return values.sum(), jax.tree.map(lambda s: s[1], statistics)

        def whole(x, scale):
            rows = None if where is None else where.reshape(8, 1)
            return value(x.reshape(8, 3), scale, rows, weights.reshape(8, 3))

        got, wanted = (
            jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(x, scale)
            for function in (sharded, whole)
        )
        # Float64 through at most a dozen operations; values are of order 1.
        for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_gradient_matches_finite_differences():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)))
        check_grads(lambda x: by_own_moments(x, None, EPSILON)[0], (x,), order=1, modes=["rev"])


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_accurate_far_from_zero(masked):
    # Mean 1e4, deviation 1e-2: the square of the mean leaves float32 no digit for the variance.
    x = np.random.default_rng(0).normal(1e4, 1e-2, size=(64, 8)).astype(np.float32)
    where = jnp.arange(64)[:, None] > 2 if masked else None  # the first rows do not count
    _, statistics = by_own_moments(jnp.asarray(x), where, EPSILON)
    x = x[3:] if masked else x
    exact = x.astype(np.float64)
    np.testing.assert_allclose(statistics.mean, exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(statistics.var, exact.var(0), rtol=1e-3)
    one_pass = (x**2).mean(0) - x.mean(0) ** 2
    assert np.abs(one_pass / exact.var(0) - 1).max() > 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7e4])
def test_equal_rows_are_standardised_to_exactly_zero(value, masked):
    x = jnp.full((100, 7), value, jnp.float32)
    where = None
    if masked:
        where = jnp.arange(100)[:, None] > 2
        x = jnp.where(where, x, 5.0)
    standardized, statistics = by_own_moments(x, where, EPSILON)
    assert np.all(standardized[3:] == 0)
    assert np.all(statistics.mean == jnp.float32(value)) and np.all(statistics.var == 0)


def test_results_are_finite_for_one_row_or_none():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4)), jnp.float32)
    for where in (None, jnp.zeros((1, 1), bool)):
        outputs = by_own_moments(x, where, EPSILON)
        gradient = jax.grad(lambda x, w=where: by_own_moments(x, w, EPSILON)[0].sum())(x)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((outputs, gradient)))
        assert np.all(outputs[1].var == 0)


def test_masked_out_rows_have_no_effect():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 4)), jnp.float32)
    where = jnp.asarray([True, True, False, True, False])[:, None]
    outputs = by_own_moments(x, where, EPSILON)
    changed = by_own_moments(jnp.where(where, x, jnp.inf), where, EPSILON)
    for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(changed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_input_has_float32_statistics():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(32, 4)), jnp.bfloat16)
    standardized, statistics = by_own_moments(x, None, EPSILON)
    gradient = jax.grad(lambda x: by_own_moments(x, None, EPSILON)[0].sum())(x)
    assert {standardized.dtype, statistics.mean.dtype, statistics.var.dtype} == {jnp.float32.dtype}
    assert gradient.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(statistics.var, exact.var(0), rtol=1e-5)


def test_running_average_updates_only_selected_rows():
    running = Statistics(jnp.zeros((3, 2)), jnp.ones((3, 2)))
    batch = Statistics(jnp.full((3, 2), 10.0), jnp.full((3, 2), 5.0))
    where = jnp.asarray([True, False, True])[:, None]
    mean, var = running_average(running, batch, 0.9, where)
    np.testing.assert_allclose(mean, [[1, 1], [0, 0], [1, 1]], rtol=1e-6)
    np.testing.assert_allclose(var, [[1.4, 1.4], [1, 1], [1.4, 1.4]], rtol=1e-6)


def test_second_derivatives_raise():
    def slope(x):
        return jax.grad(lambda x: jnp.sum(by_own_moments(x, None, EPSILON)[0] ** 3))(x).sum()

    with pytest.raises(NotImplementedError, match="second derivatives"):
        jax.grad(slope)(jnp.arange(6.0).reshape(3, 2))
