"""Tests of the command; those of jobs are in tests/experiments/launching/test_slurm.py."""

import shlex
import sys
from pathlib import Path

import pytest
from absl import flags

from experiments.runtime.errors import UserError
from scripts import slurm
from tests.flag_values import fresh_flags
from tests.scripts.made_up import ODD

ROOT = Path(__file__).parents[2]
JOB = (
    "--nodes=2",
    "--gpus_per_node=8",
    "--cpus_per_task=4",
    "--mem_gb=64",
    "--time",
    "1-00:30:00",
    "--partition=gpu",
    "--time_to_save=300",
    "--setup=module load cuda",
    "--extra=reservation=vision",
    "--extra=exclusive",
)
OPTIONS = (
    "nodes=2",
    "ntasks-per-node=8",
    "gpus-per-node=8",
    "cpus-per-task=4",
    "mem=64GB",
    "time=1470",
    "partition=gpu",
    "signal=USR2@300",
    "reservation=vision",
    "exclusive",
    "requeue",
)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command in this process, from the repository; returns what it prints."""
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        argv = ["slurm", *arguments]
        with fresh_flags(argv):
            slurm.define_flags()
            slurm.submit(slurm.parse_flags(argv))
        return capsys.readouterr().out

    return call


def test_dry_run_prints_the_submitted_script(call, tmp_path, monkeypatch):
    folder = tmp_path / ODD
    run = ["--config=configs/ptb.py", f"--workdir={folder}", "--config.eval_lengths=50,100"]
    script, command = call(*JOB, *run, "--dry_run").split("\n# which runs in each process\n")
    assert not folder.exists()
    lines = script.splitlines()
    name = f"job-name={shlex.quote(ODD)}"
    assert {f"#SBATCH --{option}" for option in (*OPTIONS, name)} <= set(lines)
    assert "module load cuda" in lines
    srun = shlex.split(lines[-1])
    assert srun[0] == "srun" and f"{folder}/slurm/%j_%t_log.err" in srun
    assert srun[-1] == f"{folder}/slurm"
    main = [sys.executable, "-m", "experiments.main", "--distributed"]
    assert shlex.split(command) == [*main, *run]

    commands = tmp_path / "bin"
    commands.mkdir()
    sbatch = f'#!/bin/sh\n/bin/cat "$1" >"{tmp_path}/submitted"\necho "Submitted batch job 7"\n'
    for name, text in (("sbatch", sbatch), ("srun", "")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands))
    said = call(*JOB, *run)
    assert (tmp_path / "submitted").read_text() == script
    assert said == f"Job 7: {command.rstrip()}\nLogs: {folder}/slurm/7_0_log.out\n"


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "--time"),
        (["--time=1:00"], "--time"),
        (["--time=2"], "--time=2 is too short"),
        (["--time=9", "--extra==x"], "--extra==x"),
        (["--time=9", "--nodes=0"], "--nodes=0"),
        (["--time=9", "--node=2"], "Did you mean: nodes"),
        (["--time=9", "--config.sed=2"], "config.sed"),
        (["--time=9", "--config.pixel_order=x"], "config.pixel_order"),
        (["--time=9", "--config.task=digits"], "config.task"),
        (["--time=9", "--config.parallel.devices=1", "--nodes=3"], "config.batch_size"),
        (["--time=9", "--config=configs/ptb.py", "--workdir=README.md"], "--workdir=README.md"),
        (["--time=9", "--workdir=runs/x"], "sbatch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments_raise_before_submission(call, monkeypatch, arguments, named):
    monkeypatch.setenv("PATH", "")
    with pytest.raises((UserError, flags.Error)) as caught:
        call(*arguments)
    assert named in str(caught.value)
