"""SLURM jobs without SLURM: shell scripts replace its commands."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.helpers import DelayedSubmission

from configs import digits
from experiments.launching import launchers, runner, slurm
from experiments.launching.launchers import Slurm
from experiments.launching.slurm import Job
from experiments.launching.sweeps import make_points
from experiments.runtime.errors import UserError
from tests.scripts.made_up import results_of

ROOT = Path(__file__).parents[3]
FLAGS = dict.fromkeys((*slurm.PARAMETERS, "mem_gb", "jobs"), None)
FLAGS |= {"time": "5", "time_to_save": 120, "extra": [], "setup": [], "dry_run": False}


@pytest.mark.parametrize(
    "time, expected", [("90", 90), ("02:30:59", 150), ("1-01:00:00", 1500), ("0:10:00", 10)]
)
def test_time_limits_are_converted_to_minutes(time, expected):
    assert slurm.minutes(time, 120) == expected


def test_cpus_per_task_is_passed_to_srun(tmp_path):
    values = SimpleNamespace(**FLAGS | {"cpus_per_task": 8})
    executor = slurm.make_executor(tmp_path, **slurm.parameters(values))
    (srun,) = (line for line in executor.script().splitlines() if line.startswith("srun "))
    assert "--cpus-per-task=8" in srun


# ---- What a job does on a node.

# Replaces a run: sends the job the signal that SLURM would send, and ends upon SIGTERM.
RUN = """
import os, pathlib, signal, sys, time
folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def stop(*_):
    with (folder / "told").open("a") as file:
        file.write("x")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
while True:
    if number == signal.SIGUSR2:
        os.kill(os.getpid(), number)
    os.kill(os.getppid(), number)
    time.sleep(1)
"""


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    earlier = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


def test_job_fails_with_the_exit_status_of_its_command(handlers):
    Job(["true"])()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        Job(["bash", "-c", "exit 3"])()
    assert caught.value.returncode == 3


@pytest.mark.parametrize("number, requeued", [(signal.SIGTERM, 0), (signal.SIGUSR2, 1)])
def test_signals_stop_the_command_and_sigusr2_requeues(handlers, tmp_path, number, requeued):
    called = []
    signal.signal(signal.SIGUSR2, lambda *_: called.append((tmp_path / "told").exists()))
    job = Job([sys.executable, "-c", RUN, str(tmp_path), str(int(number))])
    if requeued:
        job()
    else:
        with pytest.raises(SystemExit):
            job()
    assert (tmp_path / "told").read_text() == "x" and called == [True] * requeued


def test_job_exits_if_requeueing_fails(handlers, tmp_path):
    def refused(*_):
        raise subprocess.CalledProcessError(1, ["scontrol", "requeue"])

    signal.signal(signal.SIGUSR2, refused)
    with pytest.raises(SystemExit):
        Job([sys.executable, "-c", RUN, str(tmp_path), str(int(signal.SIGUSR2))])()
    assert (tmp_path / "told").read_text() == "x"


# Loads a submitted job and runs it, as submitit does on a node.
PROCESS = "import sys; from submitit.core.submission import process_job; process_job(sys.argv[1])"


def start_job(folder, number, rank="0"):
    """Starts a process of job 7, whose command sends it the signal `number`, as SLURM would."""
    folder.mkdir(exist_ok=True)
    delayed = DelayedSubmission(Job([sys.executable, "-c", RUN, str(folder), str(int(number))]))
    delayed.set_timeout(60, 3)
    delayed.dump(folder / "7_submitted.pkl")
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": rank, "SUBMITIT_EXECUTOR": "slurm"}
    command = [sys.executable, "-c", PROCESS, folder]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment)


def test_only_the_first_process_requeues_the_job(tmp_path, cluster):
    processes = [start_job(tmp_path / rank, signal.SIGUSR2, rank) for rank in ("0", "1")]
    first, other = (process.wait(60) for process in processes)
    assert first != 0 and other == 0  # an error in the other would end the job
    assert (cluster / "scontrol.called").read_text() == "requeue 7\n"
    for rank in ("0", "1"):
        assert (tmp_path / rank / "told").read_text() == "x"
    again = DelayedSubmission.load(tmp_path / "0" / "7_submitted.pkl")
    assert isinstance(again.function, Job) and not (tmp_path / "0/7_0_result.pkl").exists()


def test_stopped_job_writes_no_result(tmp_path):
    assert start_job(tmp_path, signal.SIGTERM).wait(60) == 143
    assert (tmp_path / "told").exists()
    assert not (tmp_path / "7_0_result.pkl").exists()


# ---- Points of a sweep as jobs.


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of scripts that replace SLURM's commands. A file `wait` in it keeps jobs queued."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "sbatch": f"""cd {folder}
            if [ -e refuse ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi
            id=$((101 + $(ls scripts.* 2>/dev/null | wc -l))); cp $1 scripts.$id
            cd '{ROOT}'; export SLURM_JOB_ID=$id SLURM_NTASKS=1
            if [ ! -e {folder}/wait ]; then bash {folder}/scripts.$id >/dev/null 2>&1 & fi
            echo "Submitted batch job $id" """,
        "srun": """out=${3//%j/$SLURM_JOB_ID} err=${5//%j/$SLURM_JOB_ID}; shift 5
            exec "$@" >> ${out//%t/0} 2>> ${err//%t/0}""",
        "sacct": f"cat {folder}/states",
        "scancel": f'echo "$@" >>{folder}/scancel.called',
        "scontrol": f'echo "$@" >>{folder}/scontrol.called',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "states").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm.SubmittedJob, "watcher", slurm.States(delay_s=0))
    return folder


def set_state(cluster, state, job=101):
    """Makes sacct print the state of a job, or no job if the state is empty."""
    table = f"JobID|State|NodeList\n{job}|{state}|\n" if state else ""
    (cluster / "states").write_text(table)
    slurm.SubmittedJob.watcher.update()


def make(folder):
    config = digits.get_config()
    config.model.kind = "lstm"
    return make_points(config, [{"seed": seed} for seed in (1, 2)], folder)


def test_points_run_as_slurm_jobs(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(Slurm, "interval", 0.1)
    monkeypatch.setattr(launchers, "FILES_ARRIVE_S", 0)
    folder = tmp_path / "sweep"
    points = make(folder)
    results = shlex.quote(json.dumps(results_of(points[0])))
    finish = f"mkdir {points[0].folder}; echo {results} >{points[0].folder}/results.json"
    commands = [finish, "echo 'error: made up' >&2; exit 2"]
    commands = {p.name: ["bash", "-c", c] for p, c in zip(points, commands, strict=True)}
    launcher = Slurm(folder, SimpleNamespace(**FLAGS))
    errors = runner.run(points, commands, launcher, lambda _: None)
    assert errors == {"seed=2": f"error: made up ({folder}/jobs/seed=2/102_0_log.err)"}
    assert points[0].finished()
    assert (cluster / "scripts.101").read_text() in launcher.describe(points[0], ["true"])


def test_restarted_sweep_finds_its_queued_jobs(cluster, tmp_path, capsys):
    (cluster / "wait").touch()
    first, second = make(tmp_path)
    launcher = Slurm(tmp_path, SimpleNamespace(**FLAGS))
    assert not launcher.find(first)
    launcher.start(first, ["true"])
    launcher.stop()
    assert "scancel 101" in capsys.readouterr().err
    unfinished, ended = ("", "PENDING", "SUSPENDED"), ("NODE_FAIL", "PREEMPTED", "CANCELLED by 7")
    for state in unfinished + ended:
        running = state in unfinished
        set_state(cluster, state)
        again = Slurm(tmp_path, SimpleNamespace(**FLAGS))
        assert again.find(first) == running and not again.find(second)
    assert (cluster / "scancel.called").read_text() == 2 * "101\n"  # of the interrupted
    again.stop()
    assert "scancel" not in capsys.readouterr().err


def test_launcher_waits_for_files_of_completed_jobs(cluster, tmp_path, monkeypatch):
    (cluster / "wait").touch()
    (point, _) = make(tmp_path)
    launcher = Slurm(tmp_path, SimpleNamespace(**FLAGS))
    launcher.start(point, ["true"])
    set_state(cluster, "COMPLETED")
    assert launcher.running(point)
    later = time.monotonic() + launchers.FILES_ARRIVE_S
    monkeypatch.setattr(launchers.time, "monotonic", lambda: later)
    assert not launcher.running(point)


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED"])
def test_launcher_waits_for_slurm_to_requeue_interrupted_jobs(
    cluster, tmp_path, monkeypatch, state
):
    now = [0.0]
    monkeypatch.setattr(launchers.time, "monotonic", lambda: now[0])
    (cluster / "wait").touch()
    (point, _) = make(tmp_path)
    launcher = Slurm(tmp_path, SimpleNamespace(**FLAGS))
    launcher.start(point, ["true"])
    # The 1,200 seconds start anew after the job has been queued again.
    states = (state, 0), ("PENDING", 900), ("SUSPENDED", 5000), (state, 5000), (state, 6199)
    for after, now[0] in states:
        set_state(cluster, after)
        assert launcher.running(point), (after, now[0])
    now[0] = 6200
    assert not launcher.running(point)
    assert launcher.ending(point) == f"job 101 {state}"


def test_jobs_flag_limits_submitted_jobs(tmp_path):
    values = FLAGS | {"launcher": "slurm", "dry_run": True}
    for jobs, at_once in ((None, math.inf), (3, 3)):
        launcher = launchers.make_launcher(SimpleNamespace(**values | {"jobs": jobs}), tmp_path)
        assert launcher.at_once == at_once
    local = SimpleNamespace(launcher="local", jobs=None)
    assert launchers.make_launcher(local, tmp_path).at_once == 1


def test_rejected_jobs_bad_workdirs_and_missing_sbatch_raise(cluster, tmp_path, monkeypatch):
    (cluster / "refuse").touch()
    launcher = Slurm(tmp_path, SimpleNamespace(**FLAGS))
    with pytest.raises(UserError, match="invalid partition") as caught:
        launcher.start(make(tmp_path)[0], ["true"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--workdir"):
        Slurm(tmp_path / "a%b", SimpleNamespace(**FLAGS))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="sbatch"):
        Slurm(tmp_path, SimpleNamespace(**FLAGS))
