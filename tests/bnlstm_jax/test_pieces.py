"""Running a long sequence in pieces, with the carry passed on, equals running it whole."""

import jax
import numpy as np
import pytest

import bnlstm_jax
from tests import reference

BATCH, TIME, UNITS, ROWS = 2, 13, 3, 5
PIECES = [(13,), (1,) * 13, (4, 9), (5, 3, 5), (7, 6)]


def layer_and_variables(kind, **options):
    if kind == "lstm":
        layer = bnlstm_jax.LSTM(UNITS)
    else:
        layer = bnlstm_jax.BNLSTM(UNITS, max_steps=ROWS, use_running_average=True, **options)
    inputs = jax.random.normal(jax.random.key(0), (BATCH, TIME, 2))
    variables = layer.init(jax.random.key(1), inputs)
    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.3, 1.5, leaf.shape).astype(np.float32), variables
    )
    return layer, variables, inputs


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize(
    "kind, options",
    [("lstm", {}), ("bn_lstm", {}), ("bn_lstm", {"input_statistics": "sequence"})],
    ids=["lstm", "bn_lstm", "sequence"],
)
def test_pieces_match_the_whole_sequence(kind, options, pieces):
    layer, variables, inputs = layer_and_variables(kind, **options)
    apply = jax.jit(layer.apply, static_argnames="return_carry")
    carry, start, outputs = None, 0, []
    for length in pieces:
        carry, piece = apply(
            variables,
            inputs[:, start : start + length],
            initial_carry=carry,
            first_step=start,
            return_carry=True,
        )
        outputs.append(piece)
        start += length
    expected, expected_carry, _ = reference.bn_lstm(
        variables["params"],
        inputs,
        normalize=getattr(layer, "normalize", ()),
        statistics=variables.get("batch_stats", {}),
    )
    got = np.concatenate(outputs, axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    for state, wanted in zip(carry, expected_carry, strict=True):
        np.testing.assert_allclose(state, wanted, rtol=1e-4, atol=1e-5)


def test_first_step_is_clipped_to_the_last_statistics():
    layer, variables, inputs = layer_and_variables("bn_lstm")
    runs = [layer.apply(variables, inputs[:, :1], first_step=t) for t in (0, 1, ROWS - 1, 999)]
    assert not np.allclose(runs[0], runs[1], atol=1e-3)
    np.testing.assert_array_equal(runs[2], runs[3])
