"""Every config in the repository builds, takes a step, and says what it is."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import config as shared
from experiments import tasks, train

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
NEEDS_DATA = {"mnist", "pmnist"}
VARIANTS = [(file.stem, ()) for file in FILES] + [("pmnist", ("true",))]


@pytest.mark.parametrize("name, variant", VARIANTS, ids=str)
def test_config_builds_and_steps(name, variant, request, tmp_path):
    module = importlib.import_module(f"configs.{name}")
    assert f"python -m experiments.main --config=configs/{name}.py" in module.__doc__
    config = module.get_config(*variant)
    shared.check(config)
    data_dir = request.getfixturevalue("data_dir") if name in NEEDS_DATA else tmp_path
    config.data_dir = str(data_dir)
    config.model.features = 8
    config.batch_size = 10
    for kind in shared.MODEL_KINDS:
        config.model.kind = kind
        task = tasks.load(config)
        state = train.create_state(task, config)
        step = train.make_train_step(task, jax.random.key(0))
        before = jax.device_get(state.params)
        state = step(state, task.train_batch(0))
        total, count = state.window["loss"]
        assert 1.5 < total / count < 4  # ten classes, before learning: about log 10
        changed = jax.tree.map(lambda a, b: np.any(a != b), before, jax.device_get(state.params))
        learned = {path[-1].key for path, moved in jax.tree.leaves_with_path(changed) if moved}
        assert {"input_kernel", "recurrent_kernel", "bias", "kernel"} <= learned
        assert ("initial_hidden" in learned) == (kind == "lstm")


def test_settings_are_those_of_the_released_code():
    for name, noise, order in (("mnist", 0.1, "in_order"), ("pmnist", 0.0, "released_draw")):
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config.optimizer.to_dict() == {
            "name": "rmsprop",
            "learning_rate": 1e-3,
            "decay": 0.5,
            "clip_norm": 1.0,
        }
        assert (config.batch_size, config.num_updates, config.eval_every) == (100, 100_000, 500)
        assert (config.eval_batch_size, config.population_batch_size) == (1000, 5000)
        model = config.model
        assert (model.features, model.initial_scale, model.momentum) == (100, 0.1, 0.99)
        assert (model.recurrent_init, model.initial_hidden_noise) == ("identity", noise)
        assert (config.pixel_order, config.pixel_order_seed) == (order, 1)
