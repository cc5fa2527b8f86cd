"""The command as a user types it: each test is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    """The command's output, all of it if it is to succeed, else stderr."""
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


def test_both_models_from_one_command(prepared_dir, tmp_path):
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

    # With matplotlib there, the same command has only the picture left to do.
    assert f"Curves: {tmp_path}/comparison.png" in run(*arguments)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")

    # A run can be evaluated without saying again what it was.
    output = run("--mode=evaluate", f"--workdir={tmp_path / 'bn_lstm'}")
    results = json.loads((tmp_path / "bn_lstm" / "results.json").read_text())
    assert f"| {results['rows'][0]['accuracy']:.4f} " in output and "| LSTM " not in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.sed=2"], "config.sed: the config has no field sed; did you mean seed?"),
        (
            ["--config=configs/mnist.py", "--config.model.knd=lstm"],
            "config.model.knd: the config has no field knd; did you mean kind?",
        ),
        (["--config=configs/pminst.py"], "did you mean configs/pmnist.py?"),
        (["--config", "configs/pminst.py"], "did you mean configs/pmnist.py?"),
        (["--config=configs/pmnist.py:tru"], "did you mean true?"),
        (
            ["--config=configs/digits.py:small"],
            "configs/digits.py:small: this config has no variants",
        ),
        (["--config.seed=one"], "--config.seed=one"),
        (["--config.model.kind=bnlstm"], "config.model.kind is 'bnlstm'"),
        (["--config.batch_size=0"], "config.batch_size is 0: it must be at least 1"),
        (["--config.seed=-1"], "config.seed is -1: it must be at least 0"),
        (["--wrkdir=x"], "did you mean: workdir"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(tmp_path, arguments, message):
    if "--wrkdir=x" not in arguments:
        arguments = [f"--workdir={tmp_path / 'run'}", *arguments]
    error = run(*arguments, expect=2)
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message.lower() in error.lower()
    assert not (tmp_path / "run").exists()
