"""Every config in the repository builds, runs one update, and documents its command."""

import importlib
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import config as shared
from experiments import tasks, train_step

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
NEEDS_DATA = {
    "babi": "babi",
    "cnn_qa": "cnn",
    "mnist": "mnist",
    "pmnist": "mnist",
    "ptb": "ptb",
    "text8": "text8",
}
VARIANTS = [(file.stem, ()) for file in FILES] + [
    ("pmnist", ("true",)),
    ("ptb", ("small",)),
    pytest.param("babi", ("qa1",), marks=pytest.mark.long),
    pytest.param("cnn_qa", ("four_sentences",), marks=pytest.mark.long),
    pytest.param("cnn_qa", ("sample",), marks=pytest.mark.long),
]
# Numbers of classes; before learning, the loss is about their logarithm.
CLASSES = {"ptb": 50, "text8": 27, "text": 6}


@pytest.mark.parametrize("name, variant", VARIANTS, ids=str)
def test_config_builds_and_runs_one_update(name, variant, request, tmp_path):
    module = importlib.import_module(f"configs.{name}")
    assert f"python -m experiments.main --config=configs/{name}.py" in module.__doc__
    for word in variant:
        assert f"configs/{name}.py:{word}" in module.__doc__
    config = module.get_config(*variant)
    shared.check(config)
    if name in NEEDS_DATA:
        data_dir = request.getfixturevalue("data_dir")
        if not (data_dir / NEEDS_DATA[name]).is_dir():
            pytest.skip(f"needs original data: BNLSTM_DATA_DIR has no {NEEDS_DATA[name]}")
        config.data_dir = str(data_dir)
    else:
        config.data_dir = str(tmp_path)
    if name == "text8":
        config.split = (100_000, 5_000, 5_000)  # a prefix of the data is enough
    if name == "text":
        config.text_file = str(tmp_path / "text.txt")
        letters = np.random.default_rng(0).choice(list("a bcd"), 10_000)
        Path(config.text_file).write_text("".join(letters))
    config.model.features = 60
    config.batch_size = 10
    kinds = shared.MODEL_KINDS
    if config.task == "question_answering":
        config.num_lengths = 1
        kinds = ("bn_e_star_star",) if variant else ("lstm",)  # the others take long to compile
    for kind in kinds:
        config.model.kind = kind
        task = tasks.load(config)
        state = train_step.create_state(task, config)
        step = train_step.make_train_step(task, jax.random.key(0))
        before = jax.device_get(state.params)
        state = step(state, task.train_batch(0))
        total, count = state.window["loss"]
        classes = task.record.get("vocabulary_size") or CLASSES.get(name, 10)
        assert abs(total / count - math.log(classes)) < 1
        changed = jax.tree.map(lambda a, b: np.any(a != b), before, jax.device_get(state.params))
        learned = {path[-1].key for path, moved in jax.tree.leaves_with_path(changed) if moved}
        assert {"input_kernel", "recurrent_kernel", "bias", "kernel"} <= learned
        assert ("initial_hidden" in learned) == (kind in shared.NO_BATCH_STATISTICS)


def test_mnist_settings_match_the_released_code():
    for name, noise, order in (("mnist", 0.1, "in_order"), ("pmnist", 0.0, "released_draw")):
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config.optimizer.to_dict() == {
            "name": "rmsprop",
            "learning_rate": 1e-3,
            "decay": 0.9,  # not the released code's: see docs/differences.md
            "clip_norm": 1.0,
            "clip_rule": "norm",
            "adam_epsilon": "published",  # no effect on RMSProp
        }
        assert (config.batch_size, config.num_updates, config.eval_every) == (100, 100_000, 500)
        assert (config.eval_batch_size, config.population_batch_size) == (1000, 5000)
        model = config.model
        assert (model.features, model.initial_scale, model.momentum) == (100, 0.1, 0.99)
        assert (model.recurrent_init, model.initial_hidden_noise) == ("identity", noise)
        assert (config.pixel_order, config.pixel_order_seed) == (order, 1)


def test_language_model_settings_match_the_released_code():
    for name, units, length, batch_size, rate, updates, population in (
        ("ptb", 1000, 100, 64, 2e-3, 791, 100),
        ("text8", 2000, 180, 128, 1e-3, 3907, 1000),
    ):
        config = importlib.import_module(f"configs.{name}").get_config()
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.learning_rate, optimizer.clip_norm) == ("adam", rate, 1)
        assert (config.batch_size, config.segment_length) == (batch_size, length)
        assert (config.num_updates, config.eval_every) == (50 * updates, updates)
        assert (config.population_batch_size, config.selection) == (population, "accuracy")
        assert (optimizer.clip_rule, optimizer.adam_epsilon) == ("norm", "released")
        lengths = {"ptb": tuple(range(100, 1001, 100)), "text8": ()}[name]
        sizes = {"ptb": 100, "text8": 128}[name]
        assert (config.eval_lengths, config.eval_batch_size) == (lengths, sizes)
        model = config.model
        assert (model.features, model.initial_scale, model.momentum) == (units, 0.1, 0.95)
        assert (model.recurrent_init, model.initial_hidden_noise) == ("orthogonal", 0)
    assert config.split == (90_000_000, 5_000_000, 5_000_000)
