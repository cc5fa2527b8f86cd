import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax.batch_norm import BatchNorm
from experiments.models.sequence_classifier import SequenceClassifier

STEPS = 6


def make(layer, shape=(4, STEPS, 3)):
    x = jax.random.normal(jax.random.key(1), shape)
    return layer.init(jax.random.key(0), x, use_running_average=True)


def batch_statistics(layer, variables, *args, **kwargs):
    """The plain statistics of one batch: a running average without memory."""
    forgetful = layer.clone(momentum=0.0)
    return forgetful.apply(
        variables, *args, **kwargs, use_running_average=False, mutable=["batch_stats"]
    )[1]["batch_stats"]


def test_is_the_plain_average_of_batch_statistics():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS, momentum=0.3)
    variables = make(layer)
    batches = [jax.random.normal(jax.random.key(k), (4 + k, STEPS, 3)) for k in range(3)]
    got = bnlstm_jax.estimate_population_statistics(
        layer, variables, batches, use_running_average=False
    )
    each = [batch_statistics(layer, variables, x) for x in batches]
    wanted = jax.tree.map(lambda *s: np.mean(s, axis=0), *each)
    assert got.keys() == variables["batch_stats"].keys()
    for name in wanted:
        # Float32 sums of three.
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_steps_average_over_the_batches_that_reach_them():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    variables = make(layer)
    long, short = (jax.random.normal(jax.random.key(k), (4, t, 3)) for k, t in ((1, 5), (2, 2)))
    got = bnlstm_jax.estimate_population_statistics(
        layer, variables, [long, short], use_running_average=False
    )["cell_mean"]
    of_long, of_short = (batch_statistics(layer, variables, x)["cell_mean"] for x in (long, short))
    np.testing.assert_allclose(got[:2], (of_long[:2] + of_short[:2]) / 2, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got[2:5], of_long[2:5], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got[5], got[4])  # reached by no batch


def test_masked_steps_count_as_not_reached():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    variables = make(layer)
    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    masked = bnlstm_jax.estimate_population_statistics(
        layer,
        variables,
        [x],
        seq_lengths=jnp.array([3, 3, 3, 3]),
        use_running_average=False,
    )
    cut = bnlstm_jax.estimate_population_statistics(
        layer, variables, [x[:, :3]], use_running_average=False
    )
    for name in cut:
        np.testing.assert_allclose(masked[name], cut[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("input_statistics", ["per_step", "sequence"])
@pytest.mark.parametrize("normalize", [("input", "recurrent", "cell"), ("input",), ("cell",)])
def test_one_batch_makes_inference_equal_training(input_statistics, normalize):
    layer = bnlstm_jax.BNLSTM(
        5, max_steps=STEPS, normalize=normalize, input_statistics=input_statistics
    )
    model = SequenceClassifier(layer, 3)
    variables = make(model)
    x = jax.random.normal(jax.random.key(1), (8, STEPS, 3))
    training, _ = model.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    statistics = bnlstm_jax.estimate_population_statistics(
        model, variables, [x], use_running_average=False
    )
    inference = model.apply({**variables, "batch_stats": statistics}, x, use_running_average=True)
    # Standardising by small variances enlarges rounding errors of the statistics.
    np.testing.assert_allclose(inference, training, rtol=1e-4, atol=1e-5)


def test_takes_tuples_and_finds_layers_within_models():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, lengths, train):
            layers = [
                bnlstm_jax.BNLSTM(4, max_steps=STEPS, use_running_average=not train)
                for _ in range(2)
            ]
            return nn.Bidirectional(*layers)(x, seq_lengths=lengths)

    x, lengths = jax.random.normal(jax.random.key(1), (3, STEPS, 2)), jnp.array([6, 2, 4])
    variables = Model().init(jax.random.key(0), x, lengths, train=False)
    got = bnlstm_jax.estimate_population_statistics(Model(), variables, [(x, lengths)], train=True)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, variables["batch_stats"])
    assert all(np.any(leaf != 1) and np.any(leaf != 0) for leaf in jax.tree.leaves(got))


def test_says_what_is_wrong_where_there_is_nothing_to_average():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    variables = make(layer)
    x = jnp.zeros((4, STEPS, 3))
    with pytest.raises(ValueError, match="no batches"):
        bnlstm_jax.estimate_population_statistics(layer, variables, [], use_running_average=False)
    with pytest.raises(ValueError, match="use_running_average=False"):
        bnlstm_jax.estimate_population_statistics(layer, variables, [x], use_running_average=True)


@pytest.mark.parametrize("masked", [False, True], ids=["cut", "masked"])
def test_repeated_late_steps_count_for_every_batch(masked):
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    variables = make(layer)
    keys = jax.random.split(jax.random.key(1), 3)
    batches = [(jax.random.normal(keys[0], (4, STEPS, 3)), jnp.array([5, 2, 5, 3]))]
    for key in keys[1:]:
        x, lengths = jax.random.normal(key, (4, STEPS, 3)), jnp.array([2, 2, 1, 2])
        batches.append((x, lengths) if masked else (x[:, :2], lengths))

    class Model(nn.Module):  # that takes lengths by their position
        @nn.compact
        def __call__(self, x, lengths, **kwargs):
            return layer.clone(parent=self, name="layer")(x, seq_lengths=lengths, **kwargs)

    reached = [5, 2, 2]
    each = [batch_statistics(layer, variables, x, seq_lengths=lengths) for x, lengths in batches]
    for late_steps in ("skip", "repeat"):
        got = bnlstm_jax.estimate_population_statistics(
            Model(),
            {name: {"layer": leaves} for name, leaves in variables.items()},
            batches,
            late_steps=late_steps,
            use_running_average=False,
        )["layer"]
        for name, statistic in got.items():
            tables = [np.asarray(of[name])[:n] for of, n in zip(each, reached, strict=True)]
            if late_steps == "repeat":
                tables = [np.pad(t, ((0, STEPS - len(t)), (0, 0)), mode="edge") for t in tables]
            at = [[table[t] for table in tables if t < len(table)] for t in range(5)]
            wanted = np.stack([np.mean(rows, axis=0) for rows in at])
            # Float32 sums of three.
            np.testing.assert_allclose(statistic[:5], wanted, rtol=1e-5, atol=1e-7, err_msg=name)
            np.testing.assert_array_equal(statistic[5], statistic[4], err_msg=name)


@pytest.mark.parametrize("late_steps", ["skip", "repeat"])
def test_a_batch_without_a_row_says_nothing(late_steps):
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS, input_statistics="sequence")
    norm = BatchNorm()

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, lengths, **kwargs):
            valid = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
            y = layer.clone(parent=self, name="layer")(x, seq_lengths=lengths, **kwargs)
            return norm.clone(parent=self, name="norm")(y, mask=valid, **kwargs)

    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    some, none = jnp.array([3, 1, 2, 3]), jnp.zeros(4, int)
    variables = Model().init(jax.random.key(0), x, some, use_running_average=True)
    alone, both = (
        bnlstm_jax.estimate_population_statistics(
            Model(), variables, batches, late_steps=late_steps, use_running_average=False
        )
        for batches in ([(x, some)], [(x, some), (2 * x, none)])
    )
    jax.tree.map(np.testing.assert_array_equal, both, alone)


def test_layers_without_steps_average_over_all_batches():
    model = BatchNorm()
    batches = [jax.random.normal(jax.random.key(k), (4 + k, 3)) + k for k in range(3)]
    variables = model.init(jax.random.key(0), batches[0], use_running_average=True)
    for late_steps in ("skip", "repeat"):
        got = bnlstm_jax.estimate_population_statistics(
            model, variables, batches, late_steps=late_steps, use_running_average=False
        )
        # Whatever their sizes, and of biased variances.
        mean = np.mean([x.mean(0) for x in batches], axis=0)
        var = np.mean([x.var(0) for x in batches], axis=0)
        np.testing.assert_allclose(got["mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["var"], var, rtol=1e-5, atol=1e-6)


def test_refuses_what_it_does_not_know_about_late_steps():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    with pytest.raises(ValueError, match="'skip' or 'repeat'"):
        bnlstm_jax.estimate_population_statistics(
            layer, {}, [jnp.zeros((4, STEPS, 3))], late_steps="edge", use_running_average=False
        )
