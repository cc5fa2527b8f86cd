"""Jobs for SLURM, without SLURM: stand-ins take what it is given, and send its signals."""

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from absl import flags

from experiments.runtime.errors import UserError
from scripts import slurm
from tests.flag_values import fresh_flags
from tests.scripts.made_up import ODD

ROOT = Path(__file__).parents[2]

SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=4
#SBATCH --error={first}.err'
#SBATCH --gpus-per-node=8
#SBATCH --job-name={name}
#SBATCH --mem=64GB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output={first}.out'
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --reservation=vision
#SBATCH --signal=USR2@300
#SBATCH --time=1470
#SBATCH --wckey=submitit

# setup
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {each}.out' --error {each}.err' \
{python} -u -m submitit.core._submit {folder}
"""

JOB = (
    "--nodes=2",
    "--gpus_per_node=8",
    "--cpus_per_task=4",
    "--mem_gb=64",
    "--time=1-00:30:00",
    "--partition=gpu",
    "--time_to_save=300",
    "--setup=module load cuda",
    "--extra=reservation=vision",
)


def call(*arguments, path="", expect=0, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.slurm", *arguments],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{path}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def stand_in(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """Commands of a cluster: sbatch keeps what it is given, srun runs a process, one of two."""
    folder = tmp_path / "bin"
    stand_in(folder, "sbatch", f'cat "$1" >{tmp_path}/submitted\necho "Submitted batch job 7"')
    stand_in(folder, "srun", 'while [ "${1:0:2}" = -- ]; do\n  [ "$1" != --unbuffered ] && shift\n'
             '  shift\ndone\nexec "$@"')  # fmt: skip
    stand_in(folder, "module", "true")
    return folder


def test_a_dry_run_shows_what_is_submitted(tmp_path, cluster):
    folder = tmp_path / ODD
    run = ["--config=configs/ptb.py", f"--workdir={folder}", "--config.eval_lengths=50,100"]
    shown = call(*JOB, *run, "--dry_run").stdout
    assert not folder.exists()
    script, command = shown.split("\n# which has each process run\n")
    quoted = {"python": sys.executable, "name": ODD, "folder": f"{folder}/slurm"}
    quoted |= {"first": f"{folder}/slurm/%j_0_log", "each": f"{folder}/slurm/%j_%t_log"}
    quoted = {name: shlex.quote(text) for name, text in quoted.items()}
    quoted |= {name: quoted[name].removesuffix("'") for name in ("first", "each")}
    assert script == SCRIPT.format(**quoted)
    words = shlex.split(command)
    assert words[:4] == [sys.executable, "-m", "experiments.main", "--distributed"]
    assert words[-3:] == run

    done = call(*JOB, *run, path=cluster)
    assert (tmp_path / "submitted").read_text() == script
    assert done.stdout == f"Job 7: {command.rstrip()}\nLogs: {folder}/slurm/7_0_log.out\n"

    # The job runs that command: here it finds a mistake, and the job fails as it does.
    (tmp_path / "submitted").write_text(script.replace("module load cuda", ""))
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    pickled = folder / "slurm" / "7_submitted.pkl"
    assert b"experiments.launching.submission" in pickled.read_bytes()
    environment["PYTHONPATH"] = str(wrapper(tmp_path))
    job = subprocess.run(
        ["bash", tmp_path / "submitted"],
        cwd=ROOT,
        env=os.environ | environment | {"PATH": f"{cluster}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert job.returncode == 3, job.stderr
    assert (tmp_path / "ran").read_text() == "\n".join(words[3:])


def wrapper(tmp_path) -> Path:
    """A folder whose `sitecustomize` stands for `experiments.main`: says how it was called."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import os, sys
            if sys.orig_argv[1:3] == ["-m", "experiments.main"]:
                open({str(tmp_path / "ran")!r}, "w").write("\\n".join(sys.orig_argv[3:]))
                os._exit(3)
        """)
    )
    return folder


def message(*arguments) -> str:
    """The mistake that a command line has."""
    argv = ["slurm", *arguments]
    with fresh_flags(argv):
        own = {name: (slurm.OWN[name].value, slurm.OWN[name].present) for name in slurm.OWN}
        try:
            with pytest.raises((UserError, flags.Error)) as caught:
                slurm.submit(slurm.parse_flags(argv)[1:])
        finally:
            for name, (value, present) in own.items():
                slurm.OWN[name].value, slurm.OWN[name].present = value, present
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "--time is missing: give a limit like 24:00:00, 2-00:00:00, or in minutes"),
        (["--time=1:00"], "--time is '1:00': give a limit"),
        (["--time=-5"], "--time is '-5': give a limit"),
        (["--time=2"], "--time=2 is too short: the run is told to stop 120 seconds before"),
        (["--time=9", "--extra=x"], "--extra=x has no value: write --extra=NAME=VALUE"),
        (["--time=9", "--nodes=0"], "flag --nodes=0: 0 is not a positive integer"),
        (["--time=9", "--gpus_per_node=many"], "flag --gpus_per_node=many"),
        (["--time=9", "--gpus=8"], "Unknown command line flag 'gpus'"),
        (["--time=9", "--node=2"], "Unknown command line flag 'node'. Did you mean: nodes ?"),
        (["--time=9", "--config.sed=2"], "config.sed: the config has no such field; did you mean"),
        (["--time=9", "--config.batch_size=0"], "config.batch_size is 0: it must be at least 1"),
        (["--time=9", "--config.pixel_order=x"], "config.pixel_order is 'x', which is unknown"),
        (["--time=9", "--config.model.normalize=x"], "config.model.normalize is 'x'"),
        (["--time=9", "--config.task=digits"], "config.task is 'digits', which is unknown"),
        (
            ["--time=9", "--config=configs/text.py", "--config.segment_length=1"],
            "config.segment_length is 1: it must be a whole number, at least 2",
        ),
        (
            ["--time=9", "--config=configs/babi.py", "--config.min_count=0"],
            "config.min_count is 0: it must be at least 1",
        ),
        (
            ["--time=9", "--config=configs/ptb.py", "--workdir=README.md"],
            "--workdir=README.md is not a folder",
        ),
        (
            ["--time=9", "--workdir=a%b"],
            "--workdir: jobs cannot write logs to a path with '%'",
        ),
        (["--time=9", "--workdir=runs/x"], "there is no sbatch here: call this on a login node"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_anything_is_submitted(monkeypatch, arguments, expected):
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(ROOT)
    assert message(*arguments).startswith(expected)


def test_what_sbatch_refuses(tmp_path, monkeypatch, cluster):
    stand_in(cluster, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    told = message("--time=9", f"--workdir={tmp_path / 'run'}")
    assert told == "sbatch refuses the job: sbatch: error: invalid partition"


def test_an_error_is_one_line():
    error = call("--time=soon", expect=2).stderr
    assert error.startswith("error: --time is 'soon'") and error.count("\n") == 1
