import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from configs import babi, digits, ptb
from experiments.launching import sweeps
from experiments.launching.sweeps import make_points, product, values, zipped
from experiments.runtime import files
from experiments.runtime.errors import UserError
from tests.scripts.made_up import results_of

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "configs" / "sweeps").glob("*.py"))


def test_values_product_and_zipped_make_points():
    a, b = values("a", 1, 2), values("b.c", "x", "y")
    assert a == [{"a": 1}, {"a": 2}]
    assert product(a, b) == [
        {"a": 1, "b.c": "x"},
        {"a": 1, "b.c": "y"},
        {"a": 2, "b.c": "x"},
        {"a": 2, "b.c": "y"},
    ]
    assert zipped(a, b) == [{"a": 1, "b.c": "x"}, {"a": 2, "b.c": "y"}]
    assert product(zipped(a, b), values("d", 0))[1] == {"a": 2, "b.c": "y", "d": 0}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: values("seed"), r"values\('seed'\) is empty"),
        (lambda: zipped(values("a", 1), values("b", 1, 2)), "lists of 1, 2 points"),
        (lambda: product(values("a", 1), values("a", 2)), "sets a twice in one point"),
    ],
)
def test_invalid_combinations_of_values_raise(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "code, message",
    [
        (None, "did you mean configs/sweeps/pmnist_gamma.py"),
        ("x = 1", r"has no function get_sweep\(\)"),
        ("def get_sweep(): return []", "must return a non-empty list"),
        ("def get_sweep(): return {'seed': 1}", "must return a non-empty list"),
        ("def get_sweep(): return [{}]", "must return a non-empty list"),
        ("def get_sweep(): return [{'seed': 1}, {'seed': 2}, {'seed': 1}]", "same point twice"),
    ],
)
def test_invalid_sweep_files_raise(tmp_path, monkeypatch, code, message):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "sweep.py"
    if code is not None:
        path.write_text(code)
    with pytest.raises(UserError, match=message) as caught:
        sweeps.load("configs/sweeps/pmnist_gama.py" if code is None else str(path))
    assert "\n" not in str(caught.value)


def test_point_names_are_short_unique_and_filesystem_safe():
    assert sweeps.name(
        {"model.initial_scale": 0.1, "seed": 2}, ["model.initial_scale", "seed"]
    ) == ("initial_scale=0.1,seed=2")
    both = ["optimizer.name", "model.name"]
    assert sweeps.name({"optimizer.name": "adam", "model.name": "x"}, both) == (
        "optimizer.name=adam,model.name=x"
    )
    terms = {"model.normalize": ("input", "cell")}
    assert sweeps.name(terms, ["model.normalize"]) == "normalize=input+cell"
    alike = [
        "a/b",
        "a_b",
        "A_b",
        "a b",
        "a,b",
        "a",
        "",
        "é",
        "..",
        1,
        "1.0",
        1.5,
        (1, 2),
        ("1+2",),
        ("1", "2+3"),
        ("1+2", "3"),
        "x" * 999,
    ]
    names = [sweeps.name({"field": value}, ["field"]) for value in alike]
    assert len({name.lower() for name in names}) == len(alike)
    for name in names:
        assert re.fullmatch(r"[a-z0-9._=~+-]+", name) and len(name) < 200


SWEEP_OF_NUMPY = """
import numpy as np
from experiments.launching.sweeps import (product, values, zipped)

def get_sweep():
    return product(
        values("seed", *np.arange(2, 4)),
        zipped(
            values("optimizer.learning_rate", np.float32(1e-3), np.float64(0.1)),
            values("batch_size", np.uint8(50), np.int64(60)),
            values("model.kind", *np.array(["lstm", "bn_lstm"])),
            values("model.shared_statistics", np.True_, np.False_),
            values("eval_lengths", np.arange(100, 300, 100), (np.int32(7),)),
        ),
    )
"""


def test_numpy_values_in_a_sweep_file_become_json_values(tmp_path):
    (tmp_path / "sweep.py").write_text(SWEEP_OF_NUMPY)
    points = make_points(ptb.get_config(), sweeps.load(str(tmp_path / "sweep.py")), tmp_path)
    first = {
        "seed": 2,
        "optimizer.learning_rate": 0.001,
        "batch_size": 50,
        "model.kind": "lstm",
        "model.shared_statistics": True,
        "eval_lengths": [100, 200],
    }
    last = (3, 0.1, 60, "bn_lstm", False, [7])
    for point, wanted in (points[0], first), (points[-1], dict(zip(first, last, strict=True))):
        words = [f"--config.{field}={sweeps.argument(v)}" for field, v in point.fields.items()]
        own = flags.FlagValues()
        argv = ["main", f"--config={ROOT}/configs/ptb.py", *words]
        config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
        own(argv)
        saved = flatten_dict(json.loads(own.config.to_json()), sep=".")
        assert {field: saved[field] for field in wanted} == wanted
        assert own.config.to_dict() == point.config.to_dict()
    assert points[0].name.startswith("seed=2,learning_rate=0.001,batch_size=50,kind=lstm")


def test_point_values_round_trip_through_the_command_line():
    point = {
        "seed": 3,
        "optimizer.learning_rate": 1e-5,
        "model.kind": "lstm,bn_lstm",
        "model.normalize": ("input", "cell"),
        "data_dir": "/a b/c=d",
    }
    words = [f"--config.{field}={sweeps.argument(value)}" for field, value in point.items()]
    argv = ["main", f"--config={ROOT}/configs/digits.py", *words]
    own = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
    own(argv)
    assert config_flags.get_override_values(own["config"]) == point
    (made,) = make_points(digits.get_config(), [point], Path("none"))
    assert made.config.to_dict() == own.config.to_dict()
    assert sweeps.argument(True) == "true"


@pytest.mark.parametrize(
    "point, message",
    [
        ({"model.inital_scale": 1.0}, "did you mean model.initial_scale"),
        ({"initial_scale": 1.0}, "did you mean model.initial_scale"),
        ({"model": 1}, "which is unknown"),
        ({"task": "char_lm"}, "cannot set config.task"),
        ({"seed": 1.5}, "config.seed is 1.5 in the sweep: it must be of type int"),
        ({"seed": True}, "config.seed is True in the sweep: it must be of type int"),
        ({"seed": None}, "config.seed is None in the sweep: it must be of type int"),
        ({"model.normalize": "input"}, "it must be of type tuple"),
        ({"seed": 1, "batch_size": 0}, "seed=1,batch_size=0: config.batch_size is 0"),
        ({"optimizer.learning_rate": float("nan")}, "learning_rate=nan: config.optimizer"),
        ({"model.kind": "bn_lstn"}, "did you mean bn_lstm"),
        ({"model.recurrent_init": "identiy"}, "did you mean identity"),
    ],
)
def test_invalid_points_raise_and_create_no_files(tmp_path, point, message):
    with pytest.raises(UserError, match=message) as caught:
        make_points(digits.get_config(), [{"seed": 0}, point], tmp_path / "sweep")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_points_with_an_invalid_data_subset_raise(tmp_path):
    message = "subset=qa3: config.subset is 'qa3'"
    with pytest.raises(UserError, match=message):
        make_points(babi.get_config(), [{"subset": "qa1"}, {"subset": "qa3"}], tmp_path)


def test_points_that_differ_in_the_metric_that_ranks_them_raise(tmp_path):
    points = values("selection", "accuracy", "bits_per_character")
    with pytest.raises(UserError, match="make a sweep for each value"):
        make_points(ptb.get_config(), points, tmp_path)


def test_points_with_identical_configs_raise():
    points = [{"seed": 1}, {"seed": 2}, {"model.features": 64}]
    with pytest.raises(UserError, match="seed=1 and features=64 are the same run"):
        make_points(digits.get_config(), points, Path("none"))


def test_points_take_missing_fields_from_the_config():
    points = make_points(digits.get_config(), [{"seed": 2}, {"model.features": 7}], Path("none"))
    assert [point.name for point in points] == ["seed=2", "features=7"]
    assert [point.fields for point in points] == [
        {"seed": 2, "model.features": 64},
        {"seed": 1, "model.features": 7},
    ]


def test_workdir_with_a_different_config_raises(tmp_path):
    config = digits.get_config()
    (point,) = make_points(config, [{"seed": 2}], tmp_path)
    run = point.runs["bn_lstm"]
    run.mkdir(parents=True)
    config.seed, config.model.kind, config.batch_size = 2, "bn_lstm", 9
    files.write_json(run / "config.json", json.loads(config.to_json()))
    with pytest.raises(UserError, match="batch_size is 9 in that run, 64 now"):
        make_points(digits.get_config(), [{"seed": 2}], tmp_path)


def test_point_is_finished_when_all_its_kinds_are_finished(tmp_path):
    (point,) = make_points(digits.get_config(), [{"seed": 2}], tmp_path)
    assert point.runs == {kind: tmp_path / "seed=2" / kind for kind in ("lstm", "bn_lstm")}
    for kind, updates, finished in (("lstm", 600, False), ("bn_lstm", 500, False)):
        point.runs[kind].mkdir(parents=True)
        files.write_json(point.runs[kind] / "results.json", results_of(point, updates))
        assert point.finished() == finished
    files.write_json(point.runs["bn_lstm"] / "results.json", results_of(point))
    assert point.finished()
    point.config.population_batch_size += 1  # asks for another evaluation
    assert not point.finished()
    (single,) = make_points(digits.get_config(), [{"model.kind": "lstm"}], tmp_path)
    assert single.runs == {"lstm": tmp_path / "kind=lstm"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_sweep_files_are_valid_for_their_documented_commands(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = str(file.relative_to(ROOT))
    swept = sweeps.load(name)
    text = importlib.import_module(f"configs.sweeps.{file.stem}").__doc__.replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "python -m scripts.sweep" in line]
    assert commands
    folders = []
    for command in commands:
        words = shlex.split(command)
        assert f"--sweep={name}" in words
        own = flags.FlagValues()
        argv = ["sweep", *(word for word in words if word.startswith("--config"))]
        config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
        own(argv)
        points = make_points(own.config, swept, Path("none"))
        assert len({point.name for point in points}) == len(swept) > 1
        folders += [word for word in words if word.startswith("--workdir")] or ["default"]
    assert len(set(folders)) == len(commands)
