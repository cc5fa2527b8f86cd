"""Jobs for SLURM, without SLURM: stand-ins take what it is given, and send its signals."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from absl import flags

from experiments.errors import UserError
from scripts import slurm
from tests.flag_values import fresh_flags

ROOT = Path(__file__).parents[2]

SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=4
#SBATCH --error='{folder}/slurm/%j_0_log.err'
#SBATCH --gpus-per-node=8
#SBATCH --job-name='a run'
#SBATCH --mem=64GB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output='{folder}/slurm/%j_0_log.out'
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1470
#SBATCH --wckey=submitit

# setup
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '{folder}/slurm/%j_%t_log.out' --error '{folder}/slurm/%j_%t_log.err' \
{python} -u -m submitit.core._submit '{folder}/slurm'
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
    stand_in(folder, "scontrol", f'echo "$@" >>{tmp_path}/requeued')
    stand_in(folder, "module", "true")
    return folder


def test_a_dry_run_shows_what_is_submitted(tmp_path, cluster):
    folder = tmp_path / "a run"
    run = ["--config=configs/ptb.py", f"--workdir={folder}", "--config.eval_lengths=50,100"]
    shown = call(*JOB, *run, "--dry_run").stdout
    assert not folder.exists()
    script, command = shown.split("\n# which has each process run\n")
    assert script == SCRIPT.format(folder=folder, python=shlex.quote(sys.executable))
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
    assert b"slurm_job" in pickled.read_bytes()
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
        (["--time=9", "--nodes=0"], "flag --nodes=0: 0 is not a positive integer"),
        (["--time=9", "--gpus_per_node=many"], "flag --gpus_per_node=many"),
        (["--time=9", "--gpus=8"], "Unknown command line flag 'gpus'"),
        (["--time=9", "--node=2"], "Unknown command line flag 'node'. Did you mean: nodes ?"),
        (["--time=9", "--config.sed=2"], "config.sed: the config has no field sed; did you mean"),
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


@pytest.mark.parametrize(
    "time, expected", [("90", 90), ("02:30:59", 150), ("1-01:00:00", 1500), ("0:10:00", 10)]
)
def test_time_limits(time, expected):
    assert slurm.minutes(time) == expected


# Stands for the run: saves when it is told to stop, which takes a moment.
RUN = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(number, frame):
    (folder / "told").open("a").write("x")
    time.sleep(0.3)
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / "started").touch()
while not (folder / "finish").exists():
    time.sleep(0.01)
sys.exit(int((folder / "finish").read_text()))
"""
# Loads the job as it was submitted, and runs it as submitit does.
PROCESS = "import sys; from submitit.core.submission import process_job; process_job(sys.argv[1])"


class Process:
    """A process of the job, as srun starts it."""

    def __init__(self, tmp_path: Path, cluster: Path, number: int, max_timeouts=3) -> None:
        self.folder = tmp_path / f"process_{number}"
        self.folder.mkdir()
        job = f"{max_timeouts, [sys.executable, '-c', RUN, str(self.folder)]!r}"
        code = (
            f"import sys\nfrom scripts.slurm_job import Job\n"
            f"from submitit.helpers import DelayedSubmission\nlimit, command = {job}\n"
            f"delayed = DelayedSubmission(Job(command))\ndelayed.set_timeout(60, limit)\n"
            f"delayed.dump({str(self.folder / '7_submitted.pkl')!r})"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(self.folder)],
            cwd=ROOT,
            env=os.environ
            | {"SLURM_JOB_ID": "7", "SLURM_PROCID": str(number), "SUBMITIT_EXECUTOR": "slurm"}
            | {"PATH": f"{cluster}:{os.environ['PATH']}"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while not (self.folder / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)  # until signals are waited for

    def send(self, number: int) -> None:
        """To every process of the job, as SLURM does."""
        os.killpg(self.process.pid, number)

    def ends(self) -> int:
        return self.process.wait(timeout=30)


@pytest.fixture
def start(tmp_path, cluster):
    """Starts a process of the job."""
    started = []

    def start(number=0, **settings):
        started.append(Process(tmp_path, cluster, number, **settings))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.send(signal.SIGKILL)


def requeued(tmp_path) -> str:
    path = tmp_path / "requeued"
    return path.read_text() if path.exists() else ""


def test_before_the_time_limit_a_run_saves_and_is_queued_again(tmp_path, start):
    first, other = start(0), start(1)
    for each in (other, first):
        each.send(signal.SIGUSR2)
    assert other.ends() == 0 and first.ends() != 0
    for each in (first, other):
        assert (each.folder / "saved").exists()
        assert (each.folder / "told").read_text() == "x"
    assert requeued(tmp_path) == "requeue 7\n"
    # What is queued again is the same job.
    assert (first.folder / "7_submitted.pkl").exists()
    assert not (first.folder / "7_0_result.pkl").exists()


def test_a_job_that_is_cancelled_stays_so(tmp_path, start):
    job = start()
    job.send(signal.SIGTERM)  # which the run has got too: once is enough
    time.sleep(0.1)
    assert job.ends() == 143
    assert (job.folder / "told").read_text() == "x" and requeued(tmp_path) == ""


def test_a_job_that_is_preempted_is_told_to_stop_once(tmp_path, start):
    job = start()
    job.send(signal.SIGTERM)
    time.sleep(0.1)
    job.send(signal.SIGUSR2)
    job.ends()
    assert (job.folder / "told").read_text() == "x" and (job.folder / "saved").exists()
    assert requeued(tmp_path) == "requeue 7\n"


@pytest.mark.parametrize("status", [0, 2])
def test_a_run_that_ends_by_itself(tmp_path, start, status):
    job = start()
    (job.folder / "finish").write_text(str(status))
    assert job.ends() == status and requeued(tmp_path) == ""
