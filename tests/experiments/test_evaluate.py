import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from experiments import evaluate, tasks, train_step

NOISE = jax.random.key(0)


@pytest.fixture
def task_and_variables(small_config):
    small_config.model.momentum = 0.0  # the running average is the last batch's statistics
    small_config.model.initial_scale = 1.0  # the loss depends more on statistics
    task = tasks.load(small_config)
    state = train_step.create_state(task, small_config)
    variables = train_step.variables_of(
        train_step.make_train_step(task, NOISE)(state, task.train_batch(0))
    )
    readout = variables["params"]["readout"]
    readout = {**readout, "kernel": 10 * readout["kernel"]}
    return task, {**variables, "params": {**variables["params"], "readout": readout}}


def by_hand(task, variables, images, labels, running):
    """Accuracy and loss of each example in a batch, without the evaluation code."""
    x = jnp.asarray(images, jnp.float32)[..., None] / 16
    logits, _ = task.model.apply(variables, x, use_running_average=running, mutable=["batch_stats"])
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    loss = -np.log(p[np.arange(len(labels)), labels])
    return (logits.argmax(-1) == labels).astype(float), loss


@pytest.mark.parametrize("running", [False, True])
def test_examples_of_a_short_batch_have_equal_weight(task_and_variables, small_config, running):
    task, variables = task_and_variables
    statistics = "running" if running else "batch"
    evaluator = evaluate.Evaluator(task, small_config, NOISE)
    got = evaluator.evaluate(variables, task.readings[0], "valid", statistics, 150)
    order = tasks.evaluation_order(250)
    images, labels = task.images["valid"][order], task.labels["valid"][order]
    parts = [
        by_hand(task, variables, images[s], labels[s], running)
        for s in (slice(150), slice(150, 250))
    ]
    correct, loss = (np.concatenate(values) for values in zip(*parts, strict=True))
    assert got["accuracy"] == correct.mean()
    np.testing.assert_allclose(got["loss"], loss.mean(), rtol=1e-5)


def test_batch_statistics_skip_a_last_batch_of_one_example(task_and_variables, small_config):
    task, variables = task_and_variables
    evaluator = evaluate.Evaluator(task, small_config, NOISE)
    # Of 250: the last batch has one.
    got = evaluator.evaluate(variables, task.readings[0], "valid", "batch", 83)
    order = tasks.evaluation_order(250)
    images, labels = task.images["valid"][order], task.labels["valid"][order]
    parts = [
        by_hand(task, variables, images[s], labels[s], False)
        for s in (slice(83), slice(83, 166), slice(166, 249))
    ]
    correct, loss = (np.concatenate(values) for values in zip(*parts, strict=True))
    assert got["accuracy"] == correct.mean()
    np.testing.assert_allclose(got["loss"], loss.mean(), rtol=1e-5)


def test_each_evaluation_uses_its_own_statistics(task_and_variables, small_config):
    task, variables = task_and_variables
    small_config.population_batch_size = 600  # two whole batches, and 97 examples left over
    evaluator = evaluate.Evaluator(task, small_config, NOISE)
    rows = list(evaluator.evaluate_all(variables, evaluator.population_statistics(variables)))
    assert [(row["split"], row["statistics"]) for row in rows] == [
        (split, way) for way in ("batch", "running", "population") for split in ("valid", "test")
    ]
    losses = {row["statistics"]: row["loss"] for row in rows if row["split"] == "test"}

    halves = []
    for batch in np.split(tasks.evaluation_order(1297)[:1200], 2):
        x = jnp.asarray(task.images["train"][batch], jnp.float32)[..., None] / 16
        _, updated = task.model.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"]
        )
        halves.append(updated["batch_stats"])  # momentum 0
    population = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    test = task.images["test"], task.labels["test"]
    wanted = {
        "batch": by_hand(task, variables, *test, running=False)[1].mean(),
        "running": by_hand(task, variables, *test, running=True)[1].mean(),
        "population": by_hand(task, {**variables, "batch_stats": population}, *test, running=True)[
            1
        ].mean(),
    }
    assert np.diff(sorted(wanted.values())).min() > 0.01
    for way, loss in wanted.items():
        np.testing.assert_allclose(losses[way], loss, rtol=1e-4, err_msg=way)


def test_each_batch_of_an_evaluation_draws_its_own_noise(small_config):
    small_config.model.initial_hidden_noise = 0.1
    task = tasks.load(small_config)
    variables = train_step.variables_of(train_step.create_state(task, small_config))
    evaluator = evaluate.Evaluator(task, small_config, NOISE)
    got = evaluator.evaluate(variables, task.readings[0], "valid", "batch", 125)
    losses = []
    for index, batch in enumerate(task.batches("valid", 125, task.readings[0])):
        logits, _ = task.model.apply(
            variables,
            *task.inputs(batch),
            use_running_average=False,
            rngs={"noise": jax.random.fold_in(NOISE, index)},
            mutable=["batch_stats"],
        )
        own = jnp.take_along_axis(logits, jnp.int32(batch["label"])[:, None], axis=1)[:, 0]
        losses.append(np.mean(jax.nn.logsumexp(logits, axis=1) - own))
    np.testing.assert_allclose(got["loss"], np.mean(losses), rtol=1e-6)


def test_lstm_is_evaluated_once_per_split(small_config):
    small_config.model.kind = "lstm"
    task = tasks.load(small_config)
    assert isinstance(task.model.layer, bnlstm_jax.LSTM)
    variables = train_step.variables_of(train_step.create_state(task, small_config))
    rows = evaluate.Evaluator(task, small_config, NOISE).evaluate_all(variables, None)
    assert [(row["split"], row["statistics"]) for row in rows] == [
        ("valid", "none"),
        ("test", "none"),
    ]
