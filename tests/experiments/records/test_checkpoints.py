import jax
import numpy as np
import pytest

from experiments import tasks, train, train_step
from experiments.records.checkpoints import Checkpoints, read_best, steps_in
from experiments.runtime.errors import UserError


@pytest.mark.parametrize("kind", ["lstm", "bn_lstm"])
def test_best_checkpoint_is_read_from_the_workdir_alone(small_config, tmp_path, kind):
    small_config.model.kind = kind
    small_config.num_updates = small_config.eval_every = 2
    results = train.train(small_config, tmp_path)
    # The checkpoint does not name devices, since it may be read on others.
    assert not list(tmp_path.glob("checkpoints/2/**/_sharding"))

    update, variables, statistics = read_best(tmp_path)
    assert update == results["update"] == 2
    assert statistics == {"lstm": "none", "bn_lstm": "population"}[kind]
    state = train_step.create_state(tasks.load(small_config), small_config)
    shapes = jax.tree.map(np.shape, train_step.variables_of(state))
    assert jax.tree.map(np.shape, variables) == shapes
    if kind == "bn_lstm":
        with np.load(tmp_path / "population_statistics.npz") as saved:
            for name, value in variables["batch_stats"]["layer"].items():
                np.testing.assert_array_equal(value, saved[f"layer/{name}"])
        # Without the file, or with a file of another update, running averages are read.
        np.savez(tmp_path / "population_statistics.npz", update=1, **{"layer/cell_var": [1.0]})
        update, running, statistics = read_best(tmp_path)
        assert statistics == "running"
        averages = running["batch_stats"]["layer"]["cell_var"]
        assert np.any(averages != variables["batch_stats"]["layer"]["cell_var"])
        (tmp_path / "population_statistics.npz").unlink()
        assert read_best(tmp_path)[2] == "running"


@pytest.mark.parametrize("lower_is_better, best", [(False, 2), (True, 3)])
def test_latest_two_and_best_checkpoints_are_kept(small_config, tmp_path, lower_is_better, best):
    state = train_step.create_state(tasks.load(small_config), small_config)
    with Checkpoints(tmp_path, "value", lower_is_better) as checkpoints:
        for step, value in enumerate((0.5, 0.9, 0.1, 0.2, 0.3, 0.4), start=1):
            checkpoints.save(state.replace(step=step), {"value": value})
        assert checkpoints.best_step() == best
    assert steps_in(tmp_path / "checkpoints") == [6, 5, best]


def test_checkpoint_without_a_newer_metric_is_restored(small_config, tmp_path):
    state = train_step.create_state(tasks.load(small_config), small_config)
    window = {name: (np.float32(3), np.float32(2)) for name in state.window}
    del window["gradient_norm"]
    with Checkpoints(tmp_path, "accuracy", False) as checkpoints:
        checkpoints.save(state.replace(step=7, window=window), None)
        restored = checkpoints.restore(7, state)
    assert restored.window == {**window, "gradient_norm": (0, 0)}


def test_folder_without_a_best_checkpoint_raises(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        read_best(tmp_path)
    (tmp_path / "run.json").write_text('{"selection": "accuracy", "lower_is_better": false}')
    with pytest.raises(UserError, match="holds no validated checkpoint yet"):
        read_best(tmp_path)
