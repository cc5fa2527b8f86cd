"""Variants of the equations, and masks of single terms, against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax.cells import Variant
from tests import reference

BATCH, TIME, UNITS = 4, 6, 3
# Double precision: one normalisation multiplies a rounding error (1e-16) by at most
# 1 / sqrt(epsilon) = 316, and six steps follow each other.
VALUES = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def draw(module, *arguments, **options):
    """Random variables of a module in its initial shapes, each leaf from a stream of its own."""

    def leaf(path, shape):
        random = np.random.default_rng(list(path[-1].key.encode()))
        if path[-1].key.endswith(("scale", "var")):
            return random.uniform(0.5, 1.5, shape.shape)
        return 0.7 * random.normal(size=shape.shape)

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, **options))
    return jax.tree.map_with_path(leaf, shapes)


@pytest.mark.parametrize(
    "input_statistics, masked", [("per_step", ("recurrent",)), ("sequence", ("input", "cell"))]
)
def test_per_term_masks_and_input_epsilon_match_reference(input_statistics, masked):
    # Small inputs, so that the variance is not large compared to epsilon.
    x = 1e-2 * np.random.default_rng(0).normal(size=(BATCH, TIME, UNITS))
    lengths = np.array([4, 1, 3, 2])
    layer = bnlstm_jax.BNLSTM(
        UNITS,
        max_steps=TIME,
        input_statistics=input_statistics,
        mask_statistics=masked,
        variant=Variant(learned_cell=False, input_epsilon=1e-3),
        momentum=0.0,
        param_dtype=jnp.float64,
    )
    params = draw(layer, x, use_running_average=True)["params"]
    y, updated = layer.apply(
        {"params": params}, x, seq_lengths=lengths, use_running_average=False, mutable=True
    )
    expected, _, found = reference.bn_lstm(
        params,
        x,
        seq_lengths=lengths,
        input_statistics=input_statistics,
        mask_statistics=masked,
        input_epsilon=1e-3,
    )
    np.testing.assert_allclose(y, expected, **VALUES)
    statistics = updated["batch_stats"]
    assert statistics.keys() == found.keys()
    for name, moment in found.items():
        initial = float(name.endswith("var"))  # kept where fewer than two rows count
        moment = np.where(np.isnan(moment), initial, moment)
        np.testing.assert_allclose(statistics[name], moment, **VALUES, err_msg=name)


def test_lstm_variants_match_the_reference():
    x = np.random.default_rng(0).normal(size=(BATCH, TIME, UNITS))
    variant = Variant(bias_factor=2.0, cell_bias=False, learned_cell=False)
    options = dict(variant=variant, param_dtype=jnp.float64)
    layer = bnlstm_jax.LSTM(UNITS, **options)
    cell = nn.RNN(bnlstm_jax.LSTMCell(UNITS, **options))
    params = draw(layer, x)["params"]
    assert params.keys() == {"input_kernel", "recurrent_kernel", "bias", "initial_hidden"}
    expected, _, _ = reference.bn_lstm(params, x, normalize=(), bias_factor=2)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, **VALUES)
    np.testing.assert_allclose(cell.apply({"params": {"cell": params}}, x), expected, **VALUES)

    # With the cell bias and the learned cell state that an LSTM has by default.
    layer = layer.clone(variant=Variant(bias_factor=2.0))
    params = draw(layer, x)["params"]
    assert params.keys() > {"cell_bias", "initial_cell"}
    expected, _, _ = reference.bn_lstm(params, x, normalize=(), bias_factor=2)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, **VALUES)


def test_bn_lstm_layer_and_cell_variants_match_reference():
    x = np.random.default_rng(0).normal(size=(BATCH, 1, UNITS))
    variant = Variant(2.0, cell_bias=False, learned_cell=False, input_epsilon=0.1)
    options = dict(variant=variant, param_dtype=jnp.float64, use_running_average=True)
    layer, cell = bnlstm_jax.BNLSTM(UNITS, **options), bnlstm_jax.BNLSTMCell(UNITS, **options)
    variables = draw(layer, x)
    params, statistics = variables["params"], variables["batch_stats"]
    assert "cell_bias" not in params and "initial_cell" not in params
    expected, _, _ = reference.bn_lstm(
        params, x, statistics=statistics, input_epsilon=0.1, bias_factor=2
    )
    np.testing.assert_allclose(layer.apply(variables, x), expected, **VALUES)
    of_step = {name: moment[0] for name, moment in statistics.items()}
    start = np.zeros((BATCH, UNITS)), np.tile(params["initial_hidden"], (BATCH, 1))
    _, output = cell.apply({"params": params, "batch_stats": of_step}, start, x[:, 0])
    np.testing.assert_allclose(output, expected[:, 0], **VALUES)
