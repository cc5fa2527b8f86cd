import jax
import numpy as np
import pytest

from experiments import tasks, train, train_step
from experiments.records.checkpoints import Checkpoints, read_best
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
