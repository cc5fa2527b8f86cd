import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlstm_jax import BNLSTM, estimate_population_statistics
from examples import stacked

H, STEPS = 3, 5
X = jax.random.normal(jax.random.key(1), (4, STEPS, 2))
LENGTHS = jnp.array([5, 2, 5, 1])  # each step has at least two sequences, and so a variance
MODEL = stacked.StackedBNLSTM(H, STEPS, dropout_rate=0.5)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def variables():
    return MODEL.init(jax.random.key(0), X)


def reversed_rows(x):
    """Reverses the valid steps of each sequence; the padding stays in place."""
    rows = [jnp.concatenate([row[:n][::-1], row[n:]]) for row, n in zip(x, LENGTHS, strict=True)]
    return jnp.stack(rows)


def by_hand(variables, x, layer):
    """Outputs and last hidden states of a layer, from one BNLSTM per direction."""
    single = BNLSTM(H, STEPS, return_carry=True)
    outputs, last = [], []
    for number, turn in ((2 * layer, lambda x: x), (2 * layer + 1, reversed_rows)):
        own = {name: tree[f"BNLSTM_{number}"] for name, tree in variables.items()}
        (_, h), y = single.apply(own, turn(x), seq_lengths=LENGTHS, use_running_average=True)
        outputs.append(turn(y))
        last.append(h)
    return jnp.concatenate(outputs, -1), jnp.concatenate(last, -1)


def test_inference_matches_composed_single_layers(variables):
    hidden, _ = by_hand(variables, X, 0)
    expected, last = by_hand(variables, hidden, 1)
    outputs, h = MODEL.apply(variables, X, LENGTHS)
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(outputs[row, :n], expected[row, :n], **CLOSE)
    np.testing.assert_allclose(h, last, **CLOSE)


def test_padding_has_no_effect(variables):
    padding = jnp.arange(STEPS)[None, :, None] >= LENGTHS[:, None, None]
    results = [
        MODEL.apply(
            variables,
            jnp.where(padding, filling, X),
            LENGTHS,
            train=True,
            rngs={"dropout": jax.random.key(2)},
            mutable=["batch_stats"],
        )
        for filling in (0.0, 1e6)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_dropout_applies_only_between_layers(variables):
    keys = [{"dropout": jax.random.key(seed)} for seed in (3, 4)]
    (_, first), (_, second) = (
        MODEL.apply(variables, X, LENGTHS, train=True, rngs=rngs, mutable=["batch_stats"])
        for rngs in keys
    )
    equal = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), first, second)["batch_stats"]
    assert equal["BNLSTM_0"] == equal["BNLSTM_1"] == dict.fromkeys(equal["BNLSTM_0"], True)
    assert not equal["BNLSTM_2"]["input_mean"] and not equal["BNLSTM_3"]["input_mean"]


def test_population_statistics_match_batches_with_dropout(variables):
    key = jax.random.key(5)
    population = estimate_population_statistics(
        MODEL, variables, [(X, LENGTHS)], train=True, rngs={"dropout": key}
    )
    # With momentum 0.99, an update moves running averages by 1/100 of their distance to the batch.
    _, updated = MODEL.apply(
        variables,
        X,
        LENGTHS,
        train=True,
        rngs={"dropout": jax.random.fold_in(key, 0)},
        mutable=["batch_stats"],
    )
    batch = jax.tree.map(
        lambda new, old: old + 100 * (new - old), updated["batch_stats"], variables["batch_stats"]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), population, batch)


def test_command_reduces_the_loss(capsys):
    stacked.main(updates=100)
    *losses, running, population = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[-1]) for line in losses)
    assert last < first < np.log(2)
    assert float(population.split()[-1]) > 0.7 and "running" in running
