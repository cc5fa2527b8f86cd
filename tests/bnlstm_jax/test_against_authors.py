"""LSTM and BN-LSTM against arrays that the authors' released code computed.

The arrays are in tests/data/authors, in double precision. The tests leave out the running
statistics of the authors' baseline, which updates them but does not use them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from tests import authors
from tests.authors import assert_agrees

CASES = authors.read_cases("recurrence")
UNITS = 5

# The authors' names of terms and parameters. Their gates have the order g, f, i, o.
TERMS = {"recurrent": "a", "input": "b", "cell": "c"}
PARAMETERS = {
    "input_kernel": "Wx",
    "recurrent_kernel": "Wa",
    "bias": "ab_betas",
    "cell_bias": "c_betas",
    "initial_hidden": "h0",
    "initial_cell": "c0",
}
SCALES = {f"{term}_scale": f"{letter}_gammas" for term, letter in TERMS.items()}

BASELINE = [case for case in CASES if case.endswith("train_1")]
INFERENCE = [case for case in CASES if "_inf" in case]
TRAINING = [case for case in CASES if case not in BASELINE + INFERENCE]
UPDATED = [case for case in TRAINING if "u_a_mean" in CASES[case]]
SYMBOLS = [case for case in CASES if "ids" in CASES[case]]


def tolerance(case):
    return authors.BATCH_STATISTICS if case in TRAINING else authors.NO_BATCH_STATISTICS


def converted(x):
    return authors.reorder_gates(x, "gfio") if x.shape[-1] == 4 * UNITS else x


def parameters(case, prefix="p"):
    """The parameters of a case, or their gradients, by this library's names."""
    names = PARAMETERS if case in BASELINE else PARAMETERS | SCALES
    return {ours: converted(CASES[case][f"{prefix}_{theirs}"]) for ours, theirs in names.items()}


def statistics(case, prefix="s"):
    """The statistics that a case was given, or had after the update; none if it has none."""
    return {
        f"{term}_{kind}": converted(CASES[case][f"{prefix}_{letter}_{kind}"])
        for term, letter in TERMS.items()
        for kind in ("mean", "var")
        if f"{prefix}_{letter}_{kind}" in CASES[case]
    }


def options(case):
    """The keywords that layers and cells have in common."""
    found = {"features": UNITS, "param_dtype": jnp.float64}
    if case not in BASELINE:
        found["use_running_average"] = case in INFERENCE
        # The authors weight the batch by 0.01 and 0.05.
        found["momentum"] = 0.99 if case.startswith("mnist") else 0.95
    return found


def make_layer(case, **kwargs):
    if case in BASELINE:
        return bnlstm_jax.LSTM(**options(case), **kwargs)
    steps = len(CASES[case].get("s_a_mean", CASES[case]["x"]))
    return bnlstm_jax.BNLSTM(**options(case), max_steps=steps, **kwargs)


@functools.cache
def run(case, implementation, symbols=False):
    """Outputs, last cell state, updated statistics, and gradients by parameters and inputs."""
    arrays = CASES[case]
    inputs = arrays["ids" if symbols else "x"]
    layer = make_layer(
        case,
        implementation=implementation,
        vocab_size=arrays["x"].shape[-1] if symbols else None,
        time_major=True,
        return_carry=True,
    )

    def cost(params, inputs):
        ((c, _), h), updated = layer.apply(
            {"params": params, "batch_stats": statistics(case)}, inputs, mutable=["batch_stats"]
        )
        value = (arrays["wh"] * h).sum() + (arrays["wc"][-1] * c).sum()
        return value, (h, c, updated.get("batch_stats", {}))

    with jax.enable_x64(True):
        gradient = jax.grad(cost, argnums=0 if symbols else (0, 1), has_aux=True)
        gradients, rest = jax.jit(gradient)(parameters(case), jnp.asarray(inputs))
        return jax.tree.map(np.asarray, (*rest, gradients))


def assert_gradients_agree(found, case):
    expected = parameters(case, "g")
    assert found.keys() == expected.keys()
    if case in TRAINING:  # normalisation removes the initial hidden state
        name = "initial_hidden"
        authors.assert_only_rounding(found[name], expected.pop(name), name)
    for name, gradient in expected.items():
        assert_agrees(found[name], gradient, tolerance(case), name)


def in_cases(cases):
    """Runs a test for each of the cases with each implementation."""

    def parametrize(test):
        test = pytest.mark.parametrize("implementation", ["xla", "reference"])(test)
        return pytest.mark.parametrize("case", cases)(test)

    return parametrize


@in_cases(CASES)
def test_layer_states_match_the_authors(case, implementation):
    h, c, *_ = run(case, implementation)
    assert_agrees(h, CASES[case]["h"], tolerance(case), "h")
    assert_agrees(c, CASES[case]["c"][-1], tolerance(case), "c")


@in_cases(CASES)
def test_layer_gradients_match_the_authors(case, implementation):
    *_, (by_params, by_inputs) = run(case, implementation)
    assert_gradients_agree(by_params, case)
    assert_agrees(by_inputs, CASES[case]["g_x"], tolerance(case), "inputs")


@in_cases(UPDATED)
def test_updated_running_statistics_match_the_authors(case, implementation):
    updated = run(case, implementation)[2]
    expected = statistics(case, "u")
    assert updated.keys() == expected.keys() and len(expected) == 6
    for name, value in expected.items():
        assert_agrees(updated[name], value, tolerance(case), name)


@in_cases(["ptb_inf_long"])
def test_inference_beyond_max_steps_matches_the_authors(case, implementation):
    arrays = CASES[case]
    rows, steps = len(arrays["s_a_mean"]), len(arrays["x"])
    assert rows < steps
    h, *_ = run(case, implementation)
    assert_agrees(h[rows:], arrays["h"][rows:], tolerance(case), "h beyond the statistics")


@pytest.mark.parametrize("case", SYMBOLS)
def test_symbols_match_the_authors_one_hot_vectors(case):
    h, c, _, by_params = run(case, "xla", symbols=True)
    assert_agrees(h, CASES[case]["h"], tolerance(case), "h")
    assert_agrees(c, CASES[case]["c"][-1], tolerance(case), "c")
    assert_gradients_agree(by_params, case)


@pytest.mark.parametrize("case", CASES)
def test_cell_matches_the_authors_at_every_step(case):
    """Layers return only the last cell state. This compares the states of all steps."""
    arrays, given, expected = CASES[case], statistics(case), statistics(case, "u")
    cell = (bnlstm_jax.LSTMCell if case in BASELINE else bnlstm_jax.BNLSTMCell)(**options(case))

    @jax.jit
    def step(params, carry, x, stats):
        variables = {"params": params, "batch_stats": stats}
        (carry, _), updated = cell.apply(variables, carry, x, mutable=["batch_stats"])
        return carry, updated.get("batch_stats", {})

    states = []
    with jax.enable_x64(True):
        params = {"params": parameters(case)}
        carry = cell.apply(params, None, arrays["x"][0].shape, method="initialize_carry")
        for t, x in enumerate(arrays["x"]):
            stats = {name: table[min(t, len(table) - 1)] for name, table in given.items()}
            carry, updated = step(params["params"], carry, x, stats)
            states.append(carry)
            for name, table in expected.items():
                assert_agrees(updated[name], table[t], tolerance(case), f"{name} at step {t}")
    c, h = (np.stack(state) for state in zip(*states, strict=True))
    assert_agrees(h, arrays["h"], tolerance(case), "h")
    assert_agrees(c, arrays["c"], tolerance(case), "c")
