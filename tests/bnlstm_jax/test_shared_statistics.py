"""Running statistics shared by all time steps: their values, and inference with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax import estimate_population_statistics
from bnlstm_jax.normalization import Statistics, pool_steps
from tests import reference

BATCH, TIME, INPUTS, FEATURES = 6, 4, 3, 2
LENGTHS = np.array([4, 1, 3, 2, 1, 0])


def make(**options):
    """A layer with momentum 0, so that training records the last batch; variables and inputs."""
    layer = bnlstm_jax.BNLSTM(
        FEATURES, shared_statistics=True, momentum=0.0, param_dtype=jnp.float64, **options
    )
    inputs = np.random.default_rng(0).normal(size=(BATCH, TIME, INPUTS))
    plain = layer.clone(axis_name=None)
    variables = plain.init(jax.random.key(0), jnp.asarray(inputs), use_running_average=True)
    return layer, variables, inputs


def train(layer, variables, inputs, lengths=None):
    lengths = None if lengths is None else jnp.asarray(lengths)
    return layer.apply(
        variables, inputs, seq_lengths=lengths, use_running_average=False, mutable=["batch_stats"]
    )


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "masks"])
def test_shared_statistics_pool_all_valid_steps(lengths):
    layer, variables, inputs = make()
    outputs, updated = train(layer, variables, inputs, lengths)
    statistics, params = updated["batch_stats"], variables["params"]
    valid = np.ones((BATCH, TIME), bool)
    if lengths is not None:
        valid = np.arange(TIME) < lengths[:, None]
    first = np.broadcast_to(params["initial_hidden"], (BATCH, 1, FEATURES))
    hidden = np.concatenate([first, outputs[:, :-1]], axis=1)
    rows = {
        "input": (inputs @ params["input_kernel"])[valid],
        "recurrent": (hidden @ params["recurrent_kernel"])[valid],
    }
    for term, values in rows.items():  # [rows, 4H]
        np.testing.assert_allclose(statistics[f"{term}_mean"], values.mean(0), atol=1e-12)
        np.testing.assert_allclose(statistics[f"{term}_var"], values.var(0), atol=1e-12)
    assert {name: leaf.shape for name, leaf in statistics.items()} == {
        f"{term}_{kind}": (width,)
        for term, width in (("input", 8), ("recurrent", 8), ("cell", 2))
        for kind in ("mean", "var")
    }


def test_pool_steps_matches_moments_of_all_rows():
    rng = np.random.default_rng(1)
    groups = [rng.normal(size=(n, 3)) * n + n for n in (1, 4, 2)]
    mean, var = (np.stack([f(g, 0) for g in groups] + [np.full(3, 7.0)]) for f in (np.mean, np.var))
    pooled = pool_steps(Statistics(mean, var), jnp.array([1, 4, 2, 0]))
    rows = np.concatenate(groups)
    np.testing.assert_allclose(pooled.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(pooled.var, rows.var(0), rtol=1e-12)
    nothing = pool_steps(Statistics(mean, var), jnp.zeros(4, int))
    np.testing.assert_array_equal(nothing.mean, np.zeros(3))


def test_training_outputs_match_per_step_statistics():
    layer, variables, inputs = make()
    each = layer.clone(shared_statistics=False)
    outputs, _ = train(layer, variables, inputs)
    own = each.init(jax.random.key(0), jnp.asarray(inputs), use_running_average=True)
    jax.tree.map(np.testing.assert_array_equal, own["params"], variables["params"])
    np.testing.assert_array_equal(train(each, own, inputs)[0], outputs)


def test_inference_uses_the_same_statistics_at_every_step():
    layer, variables, inputs = make()
    _, updated = train(layer, variables, inputs)
    variables = {**variables, **updated}
    longer = np.concatenate([inputs, inputs[:, ::-1]], axis=1)  # than the training sequences
    outputs = layer.apply(variables, longer, use_running_average=True)
    expected, _, _ = reference.bn_lstm(
        variables["params"], longer, statistics=variables["batch_stats"]
    )
    np.testing.assert_allclose(outputs, expected, rtol=1e-9, atol=1e-10)


def test_population_statistics_are_averages_over_batches():
    layer, variables, inputs = make()
    batches = [inputs, 2 * inputs]
    found = estimate_population_statistics(layer, variables, batches, use_running_average=False)
    each = [train(layer, variables, batch)[1]["batch_stats"] for batch in batches]
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, (each[0][name] + each[1][name]) / 2, rtol=1e-12)


def test_shared_statistics_are_pooled_over_shards():
    layer, variables, inputs = make(axis_name="batch")
    shards, lengths = inputs.reshape(2, 3, TIME, INPUTS), LENGTHS.reshape(2, 3)
    mapped = jax.vmap(lambda x, n: train(layer, variables, x, n), axis_name="batch")
    _, updated = mapped(jnp.asarray(shards), jnp.asarray(lengths))
    _, expected = train(layer.clone(axis_name=None), variables, inputs, LENGTHS)
    for name, leaf in expected["batch_stats"].items():
        np.testing.assert_allclose(updated["batch_stats"][name][0], leaf, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(*updated["batch_stats"][name])


def test_max_steps_with_shared_statistics_raises():
    with pytest.raises(ValueError, match=r"max_steps.*shared_statistics"):
        make(max_steps=4)
