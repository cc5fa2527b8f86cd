"""Tests of the command; those of its parts are in tests/experiments/launching."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import datasets

ROOT = Path(__file__).parents[2]
QUICK = {"JAX_PLATFORMS": "cpu"}
POINTS = """
from experiments.launching.sweeps import values

def get_sweep():
    return [*values("seed", 1), {"seed": 2, "batch_size": 5000}]
"""
GOOD, BAD = "seed=1", "seed=2,batch_size=5000"  # BAD fails after loading its data
SHARED = [
    "--config.model.kind=lstm",
    "--config.model.features=5",
    "--config.eval_every=2",
    "--config.log_every=1",
]


@pytest.fixture
def start(tmp_path):
    """Starts a sweep in its own process group, as a shell does."""
    file, data = tmp_path / "two.py", tmp_path / "data"
    file.write_text(POINTS)
    command = [sys.executable, "-m", "scripts.sweep", "--config=configs/digits.py", *SHARED]
    command += [f"--sweep={file}", f"--workdir={tmp_path / 'sweep'}"]
    command += [f"--config.data_dir={data}"]
    started = []

    def start(*arguments):
        started.append(
            subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=os.environ | QUICK,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()


def test_sweep_resumes_after_ctrl_c(start, tmp_path):
    folder = tmp_path / "sweep"
    datasets.load("digits", str(tmp_path / "data"))
    first = start("--config.num_updates=1000000")
    while not (folder / GOOD / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and "Traceback" not in errors, errors
    update = int(re.search(r"after update (\d+)", (folder / f"jobs/{GOOD}.log").read_text())[1])

    second = start(f"--config.num_updates={update + 2}", "--jobs=2")
    output, errors = second.communicate(timeout=120)
    assert (second.returncode, errors) == (1, "error: 1 of 2 points failed\n"), output
    failed = rf"{re.escape(BAD)}: failed: error: .* is 5000: .* \({folder}/jobs/{BAD}\.log\)"
    assert re.search(failed, output), output
    assert (folder / "results.md").read_text() in output
    assert len(json.loads((folder / GOOD / "run.json").read_text())["starts"]) == 2
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["workdir"], row["status"]) for row in rows] == [
        (GOOD, "finished"),
        (BAD, "failed"),
    ]
    results = json.loads((folder / GOOD / "results.json").read_text())
    assert results["updates"] == update + 2
    assert rows[0]["validation"] == str(results["rows"][0]["accuracy"])


def test_dry_run_for_slurm_prints_commands_and_scripts(start, tmp_path):
    process = start("--dry_run", "--launcher=slurm", "--time=1:00:00", "--account=vision")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["two.py"]
    parts = re.split(r"^# seed=.*\n", output, flags=re.MULTILINE)[1:]
    batch_size = {GOOD: 64, BAD: 5000}
    for name, part in zip((GOOD, BAD), parts, strict=True):
        command, script = part.split("\n\n", 1)
        assert shlex.split(command) == [
            *(sys.executable, "-m", "experiments.main", "--config=configs/digits.py"),
            f"--workdir={tmp_path / 'sweep' / name}",
            *SHARED,
            f"--config.data_dir={tmp_path / 'data'}",
            f"--config.seed={name[5]}",
            f"--config.batch_size={batch_size[name]}",
        ]
        jobs = tmp_path / "sweep/jobs" / name
        wanted = ["account=vision", "time=60", f"output={jobs}/%j_0_log.out", "requeue"]
        assert {f"#SBATCH --{option}" for option in wanted} <= set(script.splitlines())


@pytest.mark.parametrize(
    "argument, named",
    [("--config.seed=3", "--config.seed"), ("--launcher=slurm", "--time"), ("--mode=x", "'mode'")],
)
def test_invalid_arguments_give_one_line_and_no_workdir(start, tmp_path, argument, named):
    process = start(argument)
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert re.fullmatch(rf"error: .*{named}.*\n", errors), errors
    assert not (tmp_path / "sweep").exists()
