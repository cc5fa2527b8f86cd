"""The command as a user types it, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import main, train
from experiments.records import workdir
from experiments.runtime.errors import Stopped, UserError

ROOT = Path(__file__).parents[2]

# Runs the command with packages hidden as if they were not installed.
WITHOUT = """
import runpy, sys
for name in {hidden!r}:
    sys.modules[name] = None
sys.argv = ["main.py", *{arguments!r}]
runpy.run_module("experiments.main", run_name="__main__")
"""

SMALL = ("--config.num_updates=6", "--config.model.features=5", "--config.eval_every=3")


def run(*arguments, hidden=(), expect=0):
    """The command's stdout and stderr; stderr alone if the command is expected to fail."""
    code = WITHOUT.format(hidden=hidden, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stderr if expect else done.stdout + done.stderr


def test_one_command_trains_both_models(prepared_dir, tmp_path):
    heavy = ("tensorflow", "tensorflow_datasets", "sklearn", "matplotlib", "array_record")
    arguments = (f"--workdir={tmp_path}", f"--config.data_dir={prepared_dir}", *SMALL)
    output = run(*arguments, hidden=heavy)
    assert "no picture: matplotlib is not installed" in output
    for line in (
        "| LSTM ",
        "| BN-LSTM | batch statistics",
        "| BN-LSTM | population statistics, re",
    ):
        assert line in output
    for kind in ("lstm", "bn_lstm"):
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config["model"]["kind"] == kind and config["model"]["features"] == 5

    # With matplotlib, the same command only has to draw the picture.
    assert f"Curves: {tmp_path}/comparison.png" in run(*arguments)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")

    # Evaluation reads the config from the workdir.
    output = run("--mode=evaluate", f"--workdir={tmp_path / 'bn_lstm'}")
    results = json.loads((tmp_path / "bn_lstm" / "results.json").read_text())
    assert f"| {results['rows'][0]['accuracy']:.4f} " in output and "| LSTM " not in output


def test_closed_output_does_not_stop_a_run(prepared_dir, tmp_path):
    arguments = (f"--workdir={tmp_path}", f"--config.data_dir={prepared_dir}", *SMALL)
    reader, closed = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.main", "--config.model.kind=lstm", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=closed,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(closed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.json").exists()


def test_command_trains_and_evaluates_on_a_text_file(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("".join(np.random.default_rng(0).choice(list("one, two."), 3000)))
    folder = tmp_path / "run"
    small = ["--config.split=2000,500,500", "--config.segment_length=20", "--config.batch_size=9"]
    output = run(
        "--config=configs/text.py",
        f"--workdir={folder}",
        f"--config.text_file={text}",
        "--profile",
        *small,
        *SMALL,
    )
    name = "book.txt (2,000 / 500 / 500 characters)"
    assert f"update      3  {name} valid (batch statistics, segments of 20)" in output
    assert f"Data: {name}" in output
    assert list(folder.glob("profile/**/*.xplane.pb"))
    line = next(line for line in output.splitlines() if "| one sequence " in line)
    row = json.loads((folder / "results.json").read_text())["rows"][-1]
    assert row["reading"] == "one sequence" and row["split"] == "test"
    assert f" {row['bits_per_character']:.4f} " in line

    # A second evaluation has the run's config, except for the fields given here.
    output = run("--mode=evaluate", f"--workdir={folder}", "--config.eval_lengths=30,40")
    for length in (20, 30, 40):
        assert f"| population statistics, re-estimated    | segments of {length} " in output


@pytest.fixture
def diverging(small_config, tmp_path, monkeypatch):
    """The config of two kinds, of which the first has a non-finite value in its first update."""
    applied = train.make_train_step

    def make_train_step(task, noise):
        step = applied(task, noise)

        def refusing(state, *batches, sharding):
            return state.replace(refused=jax.tree.map(jnp.ones_like, state.refused))

        return refusing if task.config.model.kind == "lstm" else step

    monkeypatch.setattr(train, "make_train_step", make_train_step)
    given = SimpleNamespace(workdir=str(tmp_path), profile=False, mode="train")
    monkeypatch.setattr(main.flags, "FLAGS", given)
    small_config.model.kind = "lstm,bn_lstm"
    return small_config


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_kinds_after_one_that_fails_go_on(diverging, mode, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main.run_all(diverging)
    if mode == "evaluate":
        capsys.readouterr()
        main.flags.FLAGS.mode = mode
        with pytest.raises(SystemExit) as ended:
            main.run_all(diverging)
    assert ended.value.code == 2
    assert workdir.read_record(tmp_path / "lstm")["starts"][-1]["until"] == 0
    output = capsys.readouterr()
    # Once when it fails, and once after the results of the others.
    error = {"train": "was not applied: ", "evaluate": "holds no checkpoint to evaluate: "}[mode]
    assert output.err.count(error) == 2
    assert "| BN-LSTM | population statistics, re-estimated" in output.out
    assert (tmp_path / "bn_lstm" / "results.json").exists()


def test_signal_before_a_kind_diverges_stops_the_others(diverging, tmp_path, monkeypatch, capsys):
    def check_finite(training):
        signal.raise_signal(signal.SIGTERM)
        return checked(training)

    checked = train.Training.check_finite
    monkeypatch.setattr(train.Training, "check_finite", check_finite)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        main.run_all(diverging)
    assert capsys.readouterr().err.count("was not applied: ") == 1
    assert not (tmp_path / "bn_lstm").exists()


def test_missing_run_of_one_kind_is_refused_before_another_is_evaluated(
    small_config, tmp_path, monkeypatch
):
    small_config.model.kind = "lstm"
    (tmp_path / "lstm").mkdir()
    workdir.open_workdir(small_config, tmp_path / "lstm", {}, "xla")
    given = SimpleNamespace(workdir=str(tmp_path), profile=False, mode="evaluate")
    monkeypatch.setattr(main.flags, "FLAGS", given)
    monkeypatch.setattr(train, "evaluate_run", lambda *_, **__: pytest.fail("evaluated"))
    small_config.model.kind = "lstm,bn_lstm"
    with pytest.raises(UserError, match=r"bn_lstm is not the folder of a run"):
        main.run_all(small_config)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config=configs/pminst.py", "did you mean configs/pmnist.py?"),
        ("--config=LICENSE", "--config=LICENSE is not valid Python: "),
        ("--wrkdir=x", "did you mean: workdir"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(tmp_path, argument, message):
    error = run(f"--workdir={tmp_path / 'run'}", argument, expect=2)
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message.lower() in error.lower()
    assert not (tmp_path / "run").exists()
