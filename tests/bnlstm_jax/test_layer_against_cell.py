"""The layers against their cells in Flax: flax.linen.RNN, flax.linen.scan, Bidirectional.

Without masks, the layer and its cell under RNN and scan are the same recurrence with the same
parameters, and agree up to rounding.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from tests import reference

BATCH, TIME, INPUTS, FEATURES = 5, 4, 3, 2
TERMS = reference.TERMS
SUBSETS = {"LSTM": None, "all": TERMS, "no cell": TERMS[:2], "recurrent": TERMS[1:2], "none": ()}

# Single precision with values of order one: a few roundings of 6e-8, through four steps of
# normalisation by standard deviations that are not small.
SINGLE = dict(rtol=5e-6, atol=5e-6)
# Double precision. The cell does not know that its first state is the same for all rows, and takes
# the derivative of N at variance zero: 1e-16 * 316^2 at worst.
DOUBLE = dict(rtol=1e-9, atol=1e-10)


@pytest.fixture(autouse=True)
def full_precision_products():
    with jax.default_matmul_precision("float32"):
        yield


def draw(normalize, seed=0, time=TIME):
    """Random parameters, statistics, inputs and weights of a linear functional, float64."""
    rng = np.random.default_rng(seed)
    terms = normalize or ()
    width = {"input": 4 * FEATURES, "recurrent": 4 * FEATURES, "cell": FEATURES}
    params = {
        "input_kernel": 0.7 * rng.normal(size=(INPUTS, 4 * FEATURES)),
        "recurrent_kernel": 0.7 * rng.normal(size=(FEATURES, 4 * FEATURES)),
        "bias": 0.5 * rng.normal(size=4 * FEATURES),
        "cell_bias": 0.3 * rng.normal(size=FEATURES),
        "initial_hidden": 0.5 * rng.normal(size=FEATURES),
        "initial_cell": 0.5 * rng.normal(size=FEATURES),
    }
    params |= {f"{term}_scale": rng.uniform(0.5, 1.5, width[term]) for term in terms}
    stats = {f"{term}_mean": rng.normal(size=(time, width[term])) for term in terms}
    stats |= {f"{term}_var": rng.uniform(0.5, 2.0, (time, width[term])) for term in terms}
    inputs = rng.normal(size=(BATCH, time, INPUTS))
    weights = rng.normal(size=(BATCH, time, FEATURES))
    return params, stats, inputs, weights


def random_carry(seed=1):
    return tuple(0.7 * np.random.default_rng(seed).normal(size=(2, BATCH, FEATURES)))


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def assert_close(found, expected, **tolerance):
    found, expected = (dict(jax.tree.leaves_with_path(tree)) for tree in (found, expected))
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, err_msg=str(path), **tolerance)


def make_layer(normalize, train, **options):
    if normalize is None:
        return bnlstm_jax.LSTM(FEATURES, **options)
    return bnlstm_jax.BNLSTM(
        FEATURES,
        max_steps=TIME,
        normalize=normalize,
        momentum=0.9,
        use_running_average=not train,
        **options,
    )


def make_cell(normalize, train, wrap=lambda cell: cell, **options):
    if normalize is None:
        return wrap(bnlstm_jax.LSTMCell)(FEATURES, **options)
    return wrap(bnlstm_jax.BNLSTMCell)(
        FEATURES, normalize=normalize, momentum=0.9, use_running_average=not train, **options
    )


def make_rnn(normalize, train, **options):
    cell = make_cell(normalize, train, **options)
    return nn.RNN(cell, variable_axes={"batch_stats": 0}, return_carry=True)


def scanned(cell):
    return nn.scan(
        cell,
        variable_axes={"batch_stats": 0},
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
    )


@functools.cache
def runner(kind, normalize, train, param_dtype):
    """A jitted function: functional, then outputs, carry and statistics, and all gradients."""
    options = {"param_dtype": param_dtype}
    if kind == "layer":
        module = make_layer(normalize, train, return_carry=True, **options)
    elif kind == "rnn":
        module = make_rnn(normalize, train, **options)
    else:
        module = make_cell(normalize, train, scanned, **options)

    def value(params, inputs, carry, stats, weights):
        variables = {"params": params, "batch_stats": stats}
        if kind == "rnn":
            variables = {name: {"cell": leaves} for name, leaves in variables.items()}
        if kind == "scan":
            if carry is None:  # as flax.linen.RNN gets it from its cell
                start = params["initial_cell"], params["initial_hidden"]
                carry = tuple(jnp.tile(state, (BATCH, 1)) for state in start)
            result, updates = module.apply(variables, carry, inputs, mutable=["batch_stats"])
        else:
            result, updates = module.apply(
                variables, inputs, initial_carry=carry, mutable=["batch_stats"]
            )
        carry, outputs = result
        updates = updates.get("batch_stats", {})
        if kind == "rnn":
            updates = updates.get("cell", {})
        total = (weights * outputs).sum() + (carry[0] ** 2).sum()
        return total, (outputs, carry, updates)

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))


# Normalised terms (None for the LSTM), training or inference, initial states given or learned.
RUNS = {
    "LSTM": (None, True, False),
    "LSTM, given carry": (None, True, True),
    "training": (TERMS, True, False),
    "training, given carry": (TERMS, True, True),
    "inference": (TERMS, False, False),
    "inference, given carry": (TERMS, False, True),
    "no cell": (TERMS[:2], True, False),
    "recurrent, inference": (TERMS[1:2], False, False),
    "none": ((), True, False),
}


@pytest.mark.parametrize("normalize, train, given", RUNS.values(), ids=RUNS.keys())
def test_layer_rnn_and_scan_agree(normalize, train, given):
    params, stats, inputs, weights = draw(normalize)
    arguments = params, inputs, random_carry() if given else None, stats, weights
    # All shapes are the same: without jit, runs share nearly all compiled operations.
    with jax.enable_x64(True), jax.disable_jit():
        arguments = jax.tree.map(jnp.asarray, arguments)
        (_, layer), gradients = runner("layer", normalize, train, jnp.float64)(*arguments)
        for kind in ("rnn", "scan"):
            (_, other), theirs = runner(kind, normalize, train, jnp.float64)(*arguments)
            assert_close(other, layer, **DOUBLE)
            assert_close(theirs, gradients, **DOUBLE)


@pytest.mark.parametrize("kind", [bnlstm_jax.BNLSTMCell, bnlstm_jax.BNSimpleCell])
def test_initial_hidden_gradient_of_cells_is_exactly_zero_in_training(kind):
    """Batch normalisation subtracts what all rows share. Adam would enlarge rounding errors."""
    _, _, inputs, weights = single(draw(TERMS))

    def gradient_of(train):
        rnn = nn.RNN(
            kind(FEATURES, use_running_average=not train), variable_axes={"batch_stats": 0}
        )
        variables = rnn.init(jax.random.key(0), inputs)

        def value(params):
            outputs, _ = rnn.apply({**variables, "params": params}, inputs, mutable=["batch_stats"])
            return jnp.vdot(weights, outputs)

        params = jax.tree.map(lambda leaf: leaf + 0.3, variables["params"])
        return jax.grad(value)(params)["cell"]["initial_hidden"]

    np.testing.assert_array_equal(gradient_of(True), 0)
    assert np.all(gradient_of(False) != 0)


@pytest.mark.parametrize("normalize", [None, TERMS], ids=["LSTM", "BN-LSTM"])
def test_compiled_layer_rnn_and_scan_agree_in_float32(normalize):
    params, stats, inputs, weights = draw(normalize)
    arguments = single((params, inputs, random_carry(), stats, weights))
    (_, layer), gradients = runner("layer", normalize, True, jnp.float32)(*arguments)
    for kind in ("rnn", "scan"):
        (_, other), theirs = runner(kind, normalize, True, jnp.float32)(*arguments)
        assert_close(other, layer, **SINGLE)
        # Derivatives pass through one more division by a standard deviation for each step.
        assert_close(theirs, gradients, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("normalize", SUBSETS.values(), ids=SUBSETS.keys())
def test_cell_and_layer_variables_have_matching_shapes(normalize):
    inputs = jnp.ones((BATCH, TIME, INPUTS))
    key = jax.random.key(0)
    layer = jax.eval_shape(make_layer(normalize, False).init, key, inputs)
    rnn = jax.eval_shape(make_rnn(normalize, False).init, key, inputs)
    shapes = functools.partial(jax.tree.map, jnp.shape)
    assert shapes({name: leaves["cell"] for name, leaves in rnn.items()}) == shapes(dict(layer))

    cell = make_cell(normalize, False)
    carry = cell.initialize_carry(key, (BATCH, INPUTS))
    assert shapes(carry) == ((BATCH, FEATURES), (BATCH, FEATURES))
    one = jax.eval_shape(cell.init, key, carry, inputs[:, 0])
    assert shapes(one["params"]) == shapes(layer["params"])
    statistics = {name: leaf.shape[1:] for name, leaf in layer.get("batch_stats", {}).items()}
    assert shapes(one.get("batch_stats", {})) == statistics


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("normalize", SUBSETS.values(), ids=SUBSETS.keys())
def test_cell_step_matches_the_reference(normalize, train):
    params, stats, inputs, _ = draw(normalize, seed=2, time=1)
    carry = random_carry()
    flat = {name: leaf[0] for name, leaf in stats.items()}
    call = {} if normalize is None else {"use_running_average": not train}
    options = {} if normalize is None else {"normalize": normalize, "momentum": 0.9}
    kind = bnlstm_jax.LSTMCell if normalize is None else bnlstm_jax.BNLSTMCell
    with jax.enable_x64(True), jax.disable_jit():
        cell = kind(FEATURES, param_dtype=jnp.float64, **options)
        variables = {"params": params, "batch_stats": flat}
        (state, output), update = cell.apply(
            variables, carry, inputs[:, 0], mutable=["batch_stats"], **call
        )
        new_c, new_h = state
    _, (c, h), found = reference.bn_lstm(
        params,
        inputs,
        normalize=normalize or (),
        statistics=None if train else stats,
        initial_carry=carry,
    )
    np.testing.assert_allclose(new_c, c, **DOUBLE)
    np.testing.assert_allclose(new_h, h, **DOUBLE)
    np.testing.assert_array_equal(output, new_h)
    after = reference.running_average(stats, found, 0.9) if train else stats
    after = {name: leaf[0] for name, leaf in after.items()}
    assert_close(dict(update.get("batch_stats", {})), after, **DOUBLE)


@pytest.mark.parametrize("normalize", [None, TERMS], ids=["LSTM", "BN-LSTM"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masks"])
def test_returned_carry_continues_the_sequence(normalize, masked):
    """The returned carry is the last valid state, from which a second call can continue."""
    params, stats, inputs, _ = draw(normalize)
    with jax.enable_x64(True), jax.disable_jit():
        check_continuation(normalize, masked, params, stats, inputs)


def check_continuation(normalize, masked, params, stats, inputs):
    variables = {"params": params, "batch_stats": stats}
    variables, inputs, carry = jax.tree.map(jnp.asarray, (variables, inputs, random_carry()))
    lengths = (4, 1, 3, 2, 0) if masked else (4,) * BATCH
    lengths_given = jnp.asarray(lengths) if masked else None
    layer = make_layer(normalize, False, param_dtype=jnp.float64)
    last, outputs = layer.apply(
        variables, inputs, initial_carry=carry, seq_lengths=lengths_given, return_carry=True
    )
    only = layer.apply(variables, inputs, initial_carry=carry, seq_lengths=lengths_given)
    np.testing.assert_array_equal(only, outputs)
    for b, n in enumerate(lengths):
        final = outputs[b, n - 1] if n else carry[1][b]
        np.testing.assert_array_equal(last[1][b], final)
        # The state does not change after that.
        np.testing.assert_array_equal(outputs[b, n:], np.tile(final, (TIME - n, 1)))

    # Step by step through layers of one step each, with the statistics of that step.
    state = carry
    for t in range(TIME):
        rows = jax.tree.map(lambda leaf, t=t: leaf[t : t + 1], variables["batch_stats"])
        one = layer if normalize is None else layer.clone(max_steps=1)
        state, output = one.apply(
            {"params": variables["params"], "batch_stats": rows},
            inputs[:, t : t + 1],
            initial_carry=state,
            seq_lengths=(jnp.asarray(lengths) > t).astype(int) if masked else None,
            return_carry=True,
        )
        np.testing.assert_allclose(output[:, 0], outputs[:, t], **DOUBLE)
    np.testing.assert_allclose(state[0], last[0], **DOUBLE)
    np.testing.assert_allclose(state[1], last[1], **DOUBLE)


BIDIRECTIONAL = {
    "LSTM": (None, {}),
    "BN-LSTM, training": (TERMS, {"train": True}),
    "BN-LSTM, inference": (TERMS, {"train": False}),
    "sequence, training": (TERMS, {"train": True, "input_statistics": "sequence"}),
    "all rows counted": (TERMS, {"train": True, "mask_statistics": False}),
}


@pytest.mark.parametrize("lengths", [None, (4, 1, 3, 2, 1)], ids=["full", "masks"])
@pytest.mark.parametrize("normalize, options", BIDIRECTIONAL.values(), ids=BIDIRECTIONAL.keys())
def test_bidirectional_layer_matches_the_reference(normalize, options, lengths):
    options = dict(options)
    train = options.pop("train", False)
    names = ("forward_rnn", "backward_rnn")
    params, stats = {}, {}
    for seed, name in enumerate(names):
        params[name], stats[name], inputs, _ = draw(normalize, seed)
        if options.get("input_statistics") == "sequence":
            for kind in ("input_mean", "input_var"):
                stats[name][kind] = stats[name][kind][0]
    with jax.enable_x64(True), jax.disable_jit():
        layers = [make_layer(normalize, train, param_dtype=jnp.float64, **options) for _ in names]
        variables = jax.tree.map(jnp.asarray, {"params": params, "batch_stats": stats})
        (carries, outputs), updates = nn.Bidirectional(*layers, return_carry=True).apply(
            variables,
            inputs,
            seq_lengths=None if lengths is None else jnp.asarray(lengths),
            mutable=["batch_stats"],
        )
    for k, name in enumerate(names):
        expected, carry, found = reference.bn_lstm(
            params[name],
            inputs,
            normalize=normalize or (),
            statistics=None if train else stats[name],
            seq_lengths=lengths,
            reverse=name == "backward_rnn",
            keep_order=True,
            **options,
        )
        mine = outputs[..., k * FEATURES : (k + 1) * FEATURES]
        np.testing.assert_allclose(mine, expected, **DOUBLE)
        np.testing.assert_allclose(carries[k], carry, **DOUBLE)
        if normalize is not None:
            after = stats[name]
            if train:
                after = reference.running_average(after, found, 0.9)
            assert_close(dict(updates["batch_stats"][name]), after, **DOUBLE)


@pytest.mark.parametrize("field", ["normalize", "mask_statistics"])
@pytest.mark.parametrize("terms", [("input", "cells"), "input"], ids=str)
def test_invalid_terms_raise(field, terms):
    layer = bnlstm_jax.BNLSTM(3, use_running_average=True, **{field: terms})
    with pytest.raises(ValueError, match=f"{field}: expected"):
        layer.init(jax.random.key(0), np.zeros((2, 4, 5), np.float32))
