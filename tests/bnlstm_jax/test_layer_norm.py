"""The layer-normalised LSTM: against the NumPy loop and Flax, and its own properties."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax.cells import Variant
from bnlstm_jax.normalization import layer_normalize
from tests import reference

BATCH, TIME, INPUTS, FEATURES = 5, 4, 3, 2
TERMS = reference.TERMS
SUBSETS = [TERMS, ("recurrent", "cell"), ("input",), ()]
LENGTHS = (4, 1, 3, 2, 0)
# Double precision; a few layers of rounding, and steps of 1e-6 in finite differences.
VALUES = dict(rtol=1e-9, atol=1e-10)
GRADIENTS = dict(rtol=1e-5, atol=1e-6)


def draw(terms=TERMS, seed=0):
    """Random parameters and inputs, float64."""
    rng = np.random.default_rng(seed)
    shapes = {
        "input_kernel": (INPUTS, 4 * FEATURES),
        "recurrent_kernel": (FEATURES, 4 * FEATURES),
        "bias": (4 * FEATURES,),
        "cell_bias": (FEATURES,),
        "initial_hidden": (FEATURES,),
        "initial_cell": (FEATURES,),
    }
    for term in terms:
        shapes[f"{term}_scale"] = (FEATURES if term == "cell" else 4 * FEATURES,)
    params = {name: 0.7 * rng.normal(size=shape) for name, shape in shapes.items()}
    return params, rng.normal(size=(BATCH, TIME, INPUTS)), rng.normal(size=(BATCH, TIME, FEATURES))


def test_input_epsilon_applies_only_to_the_input_term():
    """A very large epsilon removes that term."""
    with jax.enable_x64(True):
        params, inputs, _ = draw()
        fields = {"variant": Variant(input_epsilon=1e30), "param_dtype": jnp.float64}
        outputs = make_layer(**fields).apply({"params": params}, inputs)
        no_input = params | {"input_scale": np.zeros(4 * FEATURES)}
        expected = make_layer().apply({"params": no_input}, inputs)
        np.testing.assert_allclose(outputs, expected, **VALUES)
        rnn = nn.RNN(bnlstm_jax.LNLSTMCell(FEATURES, **fields))
        by_cell = rnn.apply({"params": {"cell": params}}, inputs)
        np.testing.assert_allclose(by_cell, expected, **VALUES)


def make_layer(terms=TERMS, **options):
    return bnlstm_jax.LNLSTM(FEATURES, normalize=terms, **{"param_dtype": jnp.float64} | options)


@pytest.mark.parametrize(
    "terms, masked, implementation",
    [
        (TERMS, True, "reference"),
        (TERMS, False, "xla"),
        *((terms, True, "xla") for terms in SUBSETS),
    ],
    ids=str,
)
def test_layer_matches_reference_and_finite_differences(terms, masked, implementation):
    params, inputs, weights = draw(terms)
    lengths = LENGTHS if masked else None
    layer = make_layer(terms, implementation=implementation, return_carry=True)

    def value(params, inputs):
        given = None if lengths is None else jnp.asarray(lengths)
        carry, outputs = layer.apply({"params": params}, inputs, seq_lengths=given)
        return jnp.sum(weights * outputs), (outputs, carry)

    def expected_value(values):
        own = dict(values)
        outputs, _, _ = expected_run(own, own.pop("inputs"))
        return (weights * outputs).sum()

    def expected_run(params, inputs):
        return reference.bn_lstm(
            params, inputs, normalize=terms, seq_lengths=lengths, over="features"
        )

    with jax.enable_x64(True):
        differentiated = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))
        (by_params, by_inputs), got = differentiated(*jax.tree.map(jnp.asarray, (params, inputs)))
    expected, carry, _ = expected_run(params, inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **VALUES), got, (expected, carry))
    gradients = {**by_params, "inputs": by_inputs}
    differences = reference.finite_differences(expected_value, {**params, "inputs": inputs})
    assert set(gradients) == set(differences)
    for name, theirs in differences.items():
        np.testing.assert_allclose(gradients[name], theirs, err_msg=name, **GRADIENTS)


def test_cell_under_flax_rnn_equals_the_layer():
    params, inputs, _ = draw()
    with jax.enable_x64(True):
        cell = bnlstm_jax.LNLSTMCell(FEATURES, param_dtype=jnp.float64)
        outputs = nn.RNN(cell).apply({"params": {"cell": params}}, inputs)
        expected = make_layer().apply({"params": params}, inputs)
    np.testing.assert_allclose(outputs, expected, **VALUES)


def test_layer_has_parameters_but_no_statistics():
    layer = make_layer(param_dtype=jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((BATCH, TIME, INPUTS)))
    assert set(shapes) == {"params"}
    assert jax.tree.map(jnp.shape, shapes["params"]) == {k: v.shape for k, v in draw()[0].items()}


def test_examples_are_independent():
    """An example has the same outputs alone and in a batch, whatever `use_running_average` is."""
    params, inputs, _ = draw()
    with jax.enable_x64(True):
        layer = make_layer()
        together = layer.apply({"params": params}, inputs, use_running_average=False)
        alone = layer.apply({"params": params}, inputs[:1], use_running_average=True)
    np.testing.assert_allclose(alone, together[:1], **VALUES)


def test_layer_normalize_matches_flax():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 7, 16)) * 4 + 2, jnp.float32)
    scale = jnp.asarray(rng.normal(size=16), jnp.float32)
    theirs = nn.LayerNorm(epsilon=1e-5, use_bias=False, use_fast_variance=False)
    expected = theirs.apply({"params": {"scale": scale}}, x)
    # Values of order one, after some roundings of 6e-8.
    np.testing.assert_allclose(layer_normalize(x, scale, 1e-5), expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_accurate_far_from_zero():
    """One pass would lose the variance of these: 1e4 squared leaves float32 no digit of 1."""
    x = 1e4 + np.random.default_rng(0).normal(size=(4, 64))
    found = layer_normalize(jnp.asarray(x, jnp.float32), jnp.ones(64), 0.0)
    rounded = np.float64(np.float32(x))
    expected = (rounded - rounded.mean(-1, keepdims=True)) / rounded.std(-1, keepdims=True)
    # The mean is known to half a unit in the last place of 1e4, which is 5e-4.
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradients_are_finite_after_100_zero_inputs(implementation):
    """Their products have no variance; a hidden state that starts from zero has none either."""
    layer = bnlstm_jax.LNLSTM(16, implementation=implementation)
    inputs = jnp.zeros((BATCH, 100, INPUTS))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=16))

    def finite(layer):
        variables = layer.init(jax.random.key(0), inputs)
        gradients = jax.grad(lambda v: jnp.sum(weights * layer.apply(v, inputs)))(variables)
        return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))

    assert finite(layer)
    assert not finite(layer.clone(initial_hidden_init=nn.initializers.zeros_init()))


def test_bfloat16_inputs_are_normalised_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)) + 100, jnp.bfloat16)
    found = layer_normalize(x, jnp.ones(8), 1e-5)
    assert found.dtype == jnp.float32
    # Compared with the exact result for the bfloat16 values: no further digits may be lost.
    exact = np.float64(np.asarray(x, np.float32))
    deviation = exact - exact.mean(-1, keepdims=True)
    expected = deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
