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


def test_shared_fields_are_in_every_config():
    for name, variant in VARIANTS:
        config = importlib.import_module(f"configs.{name}").get_config(*variant)
        assert set(shared.base_config()) <= set(config), name
