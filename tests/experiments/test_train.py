import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tasks, train, train_step
from experiments.records import metrics, workdir
from experiments.records.checkpoints import Checkpoints
from experiments.runtime.errors import UserError
from experiments.tasks import sequential_images


def final_state(config, folder):
    """The state in the latest checkpoint."""
    task = tasks.load(config)
    with Checkpoints(folder, task.selection, task.lower_is_better) as checkpoints:
        return checkpoints.restore(checkpoints.latest_step(), train_step.create_state(task, config))


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["lstm", "bn_lstm"])
def test_training_writes_the_files_of_a_run(small_config, tmp_path, kind):
    small_config.model.kind = kind
    results = train.train(small_config, tmp_path)
    rows = metrics.read_metrics(tmp_path)
    assert [row["update"] for row in rows if row["split"] == "train"] == [3, 6, 8]
    valid = [row for row in rows if row["split"] == "valid"]
    assert [row["update"] for row in valid] == [4, 8]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    best = max(valid, key=lambda row: (row["accuracy"], row["update"]))
    assert results["update"] == best["update"]
    again = next(row for row in results["rows"] if row["split"] == "valid")
    assert again["accuracy"] == best["accuracy"]  # the best checkpoint is the one evaluated
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["starts"]) == 1 and len(run["pixel_order"]) == 64
    assert run["starts"][0]["packages"]["jax"] == jax.__version__
    assert run["starts"][0]["until"] == 8 and run["starts"][0]["seconds"] >= 0
    assert run["starts"][0]["implementation"] == "xla"  # tests have several devices
    assert workdir.read_config(tmp_path).to_dict() == small_config.to_dict()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_several_updates_per_call_match_single_updates(small_config, tmp_path, monkeypatch):
    # The options that users have. With those of scripts/test the two programs round differently.
    options: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
    if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
        options["xla_cpu_use_fusion_emitters"] = True
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))
    small_config.updates_per_call = 2
    # Logs are due after 3 and 6 updates, validations after 4 and 8.
    done, calls = 0, []
    while done < small_config.num_updates:
        calls.append(train.updates_at_once(small_config, done))
        done += calls[-1]
    assert calls == [2, 1, 1, 2, 2]

    train.train(small_config, tmp_path / "several")
    small_config.updates_per_call = 1
    train.train(small_config, tmp_path / "single")
    # The two programs differ by rounding (6e-8). Eight updates amplify it, because RMSProp makes
    # steps of full size however small a gradient is.
    states = (final_state(small_config, tmp_path / name) for name in ("several", "single"))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    several, single = (metrics.read_metrics(tmp_path / name) for name in ("several", "single"))
    for a, b in zip(several, single, strict=True):
        assert {k: a[k] for k in ("update", "split")} == {k: b[k] for k in ("update", "split")}
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
        if a["split"] == "train":
            np.testing.assert_allclose(a["gradient_norm"], b["gradient_norm"], rtol=1e-3)


def test_gradient_norm_is_measured_before_clipping(small_config):
    small_config.optimizer.clip_norm = 1e-3
    task = tasks.load(small_config)
    state = train_step.create_state(task, small_config)
    batch = task.train_batch(0)

    def loss(params):
        logits, _ = task.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            *task.inputs(batch),
            use_running_average=False,
            mutable=["batch_stats"],
        )
        own = jnp.take_along_axis(logits, jnp.int32(batch["label"])[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)

    leaves = jax.tree.leaves(jax.grad(loss)(state.params))
    norm = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in leaves))
    assert norm > 0.01
    total, count = train_step.make_train_step(task, jax.random.key(0))(state, batch).window[
        "gradient_norm"
    ]
    np.testing.assert_allclose(total, norm, rtol=1e-4)
    assert count == 1


def test_training_metrics_are_means_since_the_last_log(small_config, tmp_path):
    task = tasks.load(small_config)
    state = train_step.create_state(task, small_config)
    step = train_step.make_train_step(task, jax.random.key(0))  # the model has no noise
    losses, norms = [], []
    for update in range(8):
        state = step(
            state.replace(window=jax.tree.map(jnp.zeros_like, state.window)),
            task.train_batch(update),
        )
        losses.append(np.divide(*state.window["loss"]))
        norms.append(np.divide(*state.window["gradient_norm"]))

    train.train(small_config, tmp_path)
    rows = [row for row in metrics.read_metrics(tmp_path) if row["split"] == "train"]
    sizes = [500, 500, 297, 500, 500, 297, 500, 500]
    for row, logged in zip(rows, (slice(3), slice(3, 6), slice(6, 8)), strict=True):
        loss = np.average(losses[logged], weights=sizes[logged])
        # The same program ran both: only the order of float32 sums differs.
        np.testing.assert_allclose(row["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(row["gradient_norm"], np.mean(norms[logged]), rtol=1e-6)


def test_each_update_draws_its_own_noise(small_config):
    small_config.model.initial_hidden_noise = 0.1
    task = tasks.load(small_config)
    batch = task.train_batch(0)
    step = train_step.make_train_step(task, jax.random.key(0))

    def params_after(update):
        state = train_step.create_state(task, small_config)
        return step(state.replace(step=jnp.int32(update)), batch).params["layer"]

    first = params_after(0)["recurrent_kernel"]
    np.testing.assert_array_equal(params_after(0)["recurrent_kernel"], first)
    assert np.any(params_after(1)["recurrent_kernel"] != first)


def test_finished_run_can_be_extended(small_config, tmp_path, monkeypatch):
    train.train(small_config, tmp_path)
    seen = []
    batch = sequential_images.Task.train_batch

    def watched(task, update, *share):
        seen.append(update)
        return batch(task, update, *share)

    monkeypatch.setattr(sequential_images.Task, "train_batch", watched)
    small_config.num_updates = 10
    assert train.train(small_config, tmp_path)["updates"] == 10
    assert seen == [0, 8, 9]  # batch 0 is read for its shapes only
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["starts"]) == 2


def test_results_of_an_earlier_update_are_replaced(small_config, tmp_path, monkeypatch):
    small_config.num_updates = 4
    train.train(small_config, tmp_path)
    small_config.num_updates = 8
    with monkeypatch.context() as patch:
        patch.setattr(train.Evaluator, "evaluate_all", lambda *_: 1 / 0)  # stopped at the very end
        with pytest.raises(ZeroDivisionError):
            train.train(small_config, tmp_path)
    assert train.train(small_config, tmp_path)["updates"] == 8


def test_evaluation_reproduces_the_training_results(small_config, tmp_path):
    results = train.train(small_config, tmp_path)
    assert results == train.evaluate_run(small_config, tmp_path)
    (tmp_path / "run.json").unlink()  # a copy may lack it
    assert results == train.evaluate_run(small_config, tmp_path)


def test_saved_config_without_wandb_is_read(small_config, tmp_path):
    saved = json.loads(small_config.to_json_best_effort())
    del saved["wandb"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert workdir.read_config(tmp_path).to_dict() == small_config.to_dict()


def test_workdir_of_another_config_raises_and_stays_unchanged(small_config, tmp_path):
    train.train(small_config, tmp_path)
    before = contents(tmp_path)
    small_config.optimizer.learning_rate = 0.1
    message = r"another config: config\.optimizer\.learning_rate is 0\.001 in that run, 0\.1 now"
    for run in (train.train, train.evaluate_run):
        with pytest.raises(UserError, match=message):
            run(small_config, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("batch_size", 2000, r"config\.batch_size"),
        ("dataset", "digit", r"digits"),
        ("data_dir", "{tmp}/prepared_by_nobody", r"damaged|missing"),
    ],
)
def test_invalid_input_creates_no_workdir(small_config, tmp_path, field, value, message):
    if field == "data_dir":
        value = value.format(tmp=tmp_path)
        (tmp_path / "prepared_by_nobody/prepared/digits").mkdir(parents=True)
    small_config[field] = value
    with pytest.raises(UserError, match=message):
        train.train(small_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluating_without_a_validated_checkpoint_raises(small_config, tmp_path, monkeypatch):
    small_config.checkpoint_every = 2

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Evaluator, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(small_config, tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint to evaluate"):
        train.evaluate_run(small_config, tmp_path)


def test_evaluating_a_missing_run_raises(small_config, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        train.evaluate_run(small_config, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_non_finite_loss_stops_the_run(small_config, tmp_path):
    small_config.model.kind = "lstm"
    small_config.optimizer.learning_rate = 1e38
    small_config.checkpoint_every = 1
    small_config.log_every = 100
    with pytest.raises(UserError, match=r"update 2 was not applied: the loss .* of update 1,"):
        train.train(small_config, tmp_path)
    kept = final_state(small_config, tmp_path)
    assert int(kept.step) == 1


def test_bn_lstm_learns_digits_faster_than_lstm(small_config, tmp_path):
    """The paper's claim in ten seconds: with as many updates, BN-LSTM makes far fewer errors."""
    small_config.batch_size = 64
    small_config.num_updates = 150
    small_config.model.features = 32
    small_config.eval_every = small_config.checkpoint_every = 150
    accuracy = {}
    for kind in ("lstm", "bn_lstm"):
        small_config.model.kind = kind
        rows = train.train(small_config, tmp_path / kind)["rows"]
        accuracy[kind] = {row["statistics"]: row["accuracy"] for row in rows[::2]}
    # Chance is 0.1.
    assert accuracy["bn_lstm"]["batch"] > accuracy["lstm"]["none"] + 0.15
    assert accuracy["bn_lstm"]["population"] > accuracy["lstm"]["none"] + 0.15
