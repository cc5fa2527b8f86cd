"""A command as a job of SLURM: what it does upon signals, with stand-ins that send them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.launching import submission
from experiments.launching.submission import Job
from tests.scripts.locks import is_held

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "time, expected", [("90", 90), ("02:30:59", 150), ("1-01:00:00", 1500), ("0:10:00", 10)]
)
def test_time_limits(time, expected):
    assert submission.minutes(time, 120) == expected


# Stands for the run: saves when it is told to stop, which takes a moment.
RUN = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a run does
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
            f"import sys\nfrom experiments.launching.submission import Job\n"
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
def cluster(tmp_path):
    """A folder with the command that queues a job again."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/requeued\n')
    (folder / "scontrol").chmod(0o755)
    return folder


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
    job.send(signal.SIGTERM)  # to all: the run gets it twice
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
    written = job.folder / "finishing"
    written.write_text(str(status))
    written.replace(job.folder / "finish")  # whole: the run looks for it all the time
    assert job.ends() == status and requeued(tmp_path) == ""


# ---- Here, without submitit around it.


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM)
    earlier = {number: signal.getsignal(number) for number in numbers}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in earlier.items():
        signal.signal(number, handler)


def test_a_job_holds_a_lock_and_passes_sigterm_on(handlers, tmp_path, capsys):
    lock, seen = tmp_path / "lock", []

    def alarm(*_):
        seen.append((is_held(lock), Path(f"/proc/{lock.read_text()}/comm").read_text()))
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(SystemExit) as ended:
        Job(["sleep", "60"], lock=lock)()
    assert ended.value.code == 128 + signal.SIGTERM
    assert seen == [(True, "sleep\n")] and not is_held(lock)
    assert capsys.readouterr().err == "error: ended by SIGTERM\n"


def test_the_environment_of_a_job(handlers, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = ["bash", "-c", "echo ${CUDA_VISIBLE_DEVICES-all}"]
    Job(command)()
    Job(command, {"CUDA_VISIBLE_DEVICES": None})()
    Job(command, {"CUDA_VISIBLE_DEVICES": "3"})()
    assert capfd.readouterr().out == "\nall\n3\n"
