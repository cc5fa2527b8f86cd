"""Symbols as inputs give the same as their one-hot vectors, which are not created."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import bnlstm_jax
from bnlstm_jax.cells import look_up, product
from tests import reference

BATCH, TIME, SYMBOLS, UNITS = 4, 5, 11, 3
# Products of a kernel with one-hot vectors are exact in any order; later operations are float32.
CLOSE = dict(rtol=1e-6, atol=1e-6)
WAYS = {
    "training": dict(use_running_average=False),
    "inference": dict(use_running_average=True),
    "masks": dict(use_running_average=False, seq_lengths=jnp.array([5, 1, 3, 2])),
    "reverse, masks": dict(
        use_running_average=False, reverse=True, seq_lengths=jnp.array([5, 1, 3, 2])
    ),
    "reverse": dict(use_running_average=True, reverse=True, keep_order=True),
}


def some_symbols(dtype=np.int32):
    return np.random.default_rng(0).integers(0, SYMBOLS, (BATCH, TIME)).astype(dtype)


def one_hot(symbols):
    return np.eye(SYMBOLS, dtype=np.float32)[symbols]


def layers(kind, **options):
    """A layer that takes symbols, and the same layer for vectors."""
    if kind == "lstm":
        return [bnlstm_jax.LSTM(UNITS, vocab_size=v, **options) for v in (SYMBOLS, None)]
    make = bnlstm_jax.BNLSTM
    return [make(UNITS, max_steps=TIME, vocab_size=v, **options) for v in (SYMBOLS, None)]


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.uniform(0.2, 1, leaf.shape).astype(leaf.dtype), tree)


def run_and_differentiate(layer, variables, inputs, **options):
    """Outputs, updates, and the gradient of a sum in which each output has its own weight."""

    def value(params):
        outputs, updated = layer.apply(
            {**variables, "params": params}, inputs, mutable=["batch_stats"], **options
        )
        weights = np.random.default_rng(2).normal(size=outputs.shape)
        return jnp.sum(weights * outputs), (outputs, updated)

    gradients, results = jax.grad(value, has_aux=True)(variables["params"])
    return *results, gradients


@pytest.mark.parametrize("kind", ["lstm", "bn_lstm"])
@pytest.mark.parametrize("way", WAYS)
def test_symbols_match_one_hot_vectors(kind, way):
    of_symbols, of_vectors = layers(kind)
    symbols = some_symbols()
    init = dict(use_running_average=True)
    variables = of_symbols.init(jax.random.key(0), symbols, **init)
    alike = of_vectors.init(jax.random.key(0), one_hot(symbols), **init)
    jax.tree.map(np.testing.assert_array_equal, variables, alike)
    variables = random_like(variables, seed=1)

    got = run_and_differentiate(of_symbols, variables, symbols, **WAYS[way])
    expected = run_and_differentiate(of_vectors, variables, one_hot(symbols), **WAYS[way])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, expected)
    assert np.any(got[-1]["input_kernel"] != 0)


def test_symbols_match_the_reference():
    layer, _ = layers("bn_lstm")
    symbols = some_symbols(np.uint8)
    variables = layer.init(jax.random.key(0), symbols, use_running_average=True)
    variables = random_like(variables, seed=3)
    outputs = layer.apply(variables, symbols, use_running_average=True)
    expected, _, _ = reference.bn_lstm(
        variables["params"], one_hot(symbols), statistics=variables["batch_stats"]
    )
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_look_up_equals_the_one_hot_product(dtype):
    kernel = jax.random.normal(jax.random.key(0), (SYMBOLS, 7))
    symbols = some_symbols()
    got = look_up(symbols, kernel, dtype)
    np.testing.assert_array_equal(got, product(one_hot(symbols), kernel, dtype))
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("train", [False, True])
def test_no_one_hot_vectors_are_created(train):
    """Only kernels have an axis of vocabulary size, in the function and in its gradient."""
    of_symbols, of_vectors = layers("bn_lstm")

    def shapes(layer, inputs):
        variables = layer.init(jax.random.key(0), inputs, use_running_average=True)
        jaxpr = jax.make_jaxpr(
            lambda v: run_and_differentiate(layer, v, inputs, use_running_average=not train)
        )(variables)
        return set(_shapes(jaxpr.jaxpr))

    kernels = {(SYMBOLS, 4 * UNITS), (4 * UNITS, SYMBOLS)}
    symbols = some_symbols()
    assert not [s for s in shapes(of_symbols, symbols) - kernels if SYMBOLS in s]
    assert [s for s in shapes(of_vectors, one_hot(symbols)) - kernels if SYMBOLS in s]


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield variable.aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from _shapes(inner)


@pytest.mark.parametrize("kind", ["lstm", "bn_lstm"])
def test_inputs_inconsistent_with_vocab_size_raise(kind):
    of_symbols, of_vectors = (
        layers(kind, use_running_average=True) if kind != "lstm" else layers(kind)
    )
    key, symbols = jax.random.key(0), some_symbols()
    with pytest.raises(ValueError, match=r"int32\[4, 5\]; set vocab_size"):
        of_vectors.init(key, symbols)
    with pytest.raises(ValueError, match=r"float32\[4, 5, 11\]"):
        of_symbols.init(key, one_hot(symbols))
    with pytest.raises(ValueError, match=r"vocab_size.*integers.*float32\[4, 5\]"):
        of_symbols.init(key, symbols.astype(np.float32))


def test_look_up_of_out_of_range_symbols_gives_nan():
    kernel = jnp.ones((SYMBOLS, 2))
    got = look_up(np.array([0, SYMBOLS - 1, SYMBOLS, 200], np.uint8), kernel)
    np.testing.assert_array_equal(np.isnan(got[:, 0]), [False, False, True, True])
    assert look_up(np.array([3], np.int8), jnp.ones((200, 2))).shape == (1, 2)
