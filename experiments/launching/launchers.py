"""Where the points of a sweep run: here, or on a SLURM cluster, by submitit.

A launcher keeps in `jobs.json` which jobs it has started for a point, so that a sweep that is
killed and started again finds them. Jobs have a folder for each point, under `jobs/`: submitit's
pickles, of what is to be run, and logs.
"""

import collections
import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit
from absl import flags, logging
from submitit.core.utils import JobPaths

from experiments.launching import submission
from experiments.launching.submission import Executor, Job
from experiments.runtime.errors import UserError
from experiments.runtime.files import read_json, write_json

LOCAL_MINUTES = 60 * 24 * 365  # submitit wants a limit
LOG_BYTES = 100_000  # at the end of a log, where its last error is looked for


def define_flags() -> None:
    """Defines the flags of a command that launches runs."""
    flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "Where runs are made.")
    flags.DEFINE_integer("jobs", 1, "Runs at once, if they are made here.", lower_bound=1)
    flags.DEFINE_integer("retries", 1, "How often to try a failed run again.", lower_bound=0)
    flags.DEFINE_boolean("dry_run", False, "Print what would be run, and write nothing.")
    submission.define_flags(flags.FLAGS)
    flags.DEFINE_float("poll", 30, "Seconds between looks at SLURM's queue.", lower_bound=0.1)


class Launcher:
    """What both have in common.

    Attributes:
      interval: seconds between looks at what became of jobs.
      most: how many points at once.
    """

    interval: float
    most: float

    def __init__(self, name: str, folder: Path) -> None:
        """Reads which jobs there were, of a launcher with that name in the sweep's folder."""
        self.folder = folder
        self._name = name
        self._path = folder / "jobs.json"
        recorded = read_json(self._path) if self._path.exists() else {}
        self._recorded: dict[str, dict[str, list[str]]] = collections.defaultdict(dict, recorded)
        self._ids = self._recorded[name]

    def check(self) -> None:
        """Refuses a machine on which this cannot launch anything."""

    def start(self, point: str, command: list[str]) -> None:
        """Starts the command of a point."""
        raise NotImplementedError

    def running(self, point: str) -> bool:
        """Whether a point runs, or is to run, started by this sweep or by an earlier one."""
        raise NotImplementedError

    def stop(self, points: list[str]) -> str:
        """Does with points what is to be done when the sweep stops; returns what to tell of it."""
        raise NotImplementedError

    def jobs_folder(self, point: str) -> Path:
        """Where submitit has the jobs of a point."""
        return (self.folder / "jobs" / point).absolute()  # as `~` is for submitit its user's

    def record(self, point: str, job: str) -> None:
        """Keeps that a job was started for a point."""
        self._ids.setdefault(point, []).append(job)
        write_json(self._path, self._recorded)

    def last_job(self, point: str) -> str | None:
        """The last job of a point."""
        return self._ids[point][-1] if point in self._ids else None

    def log(self, point: str) -> Path:
        """What the last job of a point had to say of errors."""
        return JobPaths(self.jobs_folder(point), self.last_job(point)).stderr

    def error(self, point: str) -> str:
        """The last error in a point's log, in a line."""
        try:
            with self.log(point).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return "no log: the job did not start"
        lines = [line.strip() for line in lines if line.strip()]
        told = [line for line in lines if line.startswith("error: ")] or lines
        return told[-1] if told else "ended, and said nothing"


class Local(Launcher):
    """Runs points on this machine, each in processes of its own.

    They outlive a sweep that is killed by SIGKILL, and a sweep that is started again waits for
    them: each holds a lock for as long as it runs. Ctrl-C in the terminal, or its end, reaches the
    sweep alone, which then stops its points by SIGTERM.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        """Runs so many jobs at once."""
        super().__init__("local", folder)
        self.interval = 0.5
        self.most = jobs
        self._jobs: dict[str, submitit.LocalJob[int]] = {}

    def start(self, point: str, command: list[str]) -> None:
        """Starts the command of a point."""
        executor = submitit.LocalExecutor(self.jobs_folder(point))
        executor.update_parameters(timeout_min=LOCAL_MINUTES)
        # submitit hides GPUs from jobs that it is not told to give some.
        environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
        with _blocked(signal.SIGINT, signal.SIGHUP):
            job = executor.submit(Job(command, environment, self._lock(point)))
        self._jobs[point] = job
        self.record(point, job.job_id)

    def running(self, point: str) -> bool:
        """Whether a point runs, started by this sweep or by one that was killed."""
        return (point in self._jobs and not self._jobs[point].done()) or self._locked(point)

    def stop(self, points: list[str]) -> str:
        """Stops points, and waits for their end; returns what to tell of it."""
        told = set()
        while points := [point for point in points if self.running(point)]:
            for point in points:
                if point not in told and self._locked(point):
                    process = self._lock(point).read_text()
                    if process:  # else it has not started yet
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(process), signal.SIGTERM)
                        told.add(point)  # twice would mean at once
            time.sleep(0.1)
        return "the points that ran have saved where they are"

    def _lock(self, point: str) -> Path:
        return self.jobs_folder(point) / "lock"

    def _locked(self, point: str) -> bool:
        try:
            with self._lock(point).open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


class Slurm(Launcher):
    """Submits every point as a job of its own, and watches the queue.

    A job that nears its time limit stops its run, which saves a checkpoint, and is queued again.
    """

    def __init__(
        self, folder: Path, parameters: dict[str, Any], max_timeouts: int, poll: float
    ) -> None:
        """Takes submitit's names of parameters; looks at the queue every `poll` seconds."""
        super().__init__("slurm", folder)
        self.interval = poll
        self.most = float("inf")
        self._parameters = parameters
        self._max_timeouts = max_timeouts
        self._seen: dict[str, float] | None = None  # when jobs were last in the queue
        self._looked = float("-inf")

    def check(self) -> None:
        """Refuses a machine that has no SLURM.

        Raises:
          UserError: names the command that is missing.
        """
        submission.check_commands("sbatch", "srun", "squeue")

    def script(self, point: str) -> str:
        """What sbatch is given for a point."""
        return self._executor(point).script()

    def start(self, point: str, command: list[str]) -> None:
        """Submits the command of a point.

        Raises:
          UserError: SLURM refuses it.
        """
        job = self._executor(point).submit(Job(command))
        self.record(point, job.job_id)
        if self._seen is not None:
            self._seen[job.job_id] = time.monotonic()

    def running(self, point: str) -> bool:
        """Whether a point is queued or runs. One that is gone is missed after two looks only.

        By then its files have come through a network's file system.
        """
        if time.monotonic() - self._looked >= self.interval:
            self._look()
        seen = self._seen.get(self.last_job(point), float("-inf"))
        return time.monotonic() - seen < 2 * self.interval

    def stop(self, points: list[str]) -> str:
        """Leaves jobs alone; returns what to tell of it."""
        jobs = " ".join(filter(None, map(self.last_job, points)))
        return f"jobs stay in the queue: `scancel {jobs}` stops them" if jobs else "no job is left"

    def _executor(self, point: str) -> Executor:
        executor = Executor(self.jobs_folder(point), max_num_timeout=self._max_timeouts)
        name = f"{self.folder.name}/{point}"
        executor.update_parameters(job_name=name, **self._parameters)
        return executor

    def _look(self) -> None:
        """Asks for the queue; what is there is kept if it does not answer."""
        command = ["squeue", "--noheader", "--format=%i", "--me"]
        done = subprocess.run(command, capture_output=True, text=True)
        now = self._looked = time.monotonic()
        if done.returncode == 0:
            self._seen = (self._seen or {}) | dict.fromkeys(done.stdout.split(), now)
            return
        problem = f"squeue failed: {' '.join(done.stderr.split())}"
        if self._seen is None:
            raise UserError(f"--launcher=slurm: {problem}")
        logging.warning("%s; jobs are taken to be where they were", problem)
        self._seen = dict.fromkeys(self._seen, now)


def make_launcher(given: Any, folder: Path) -> Launcher:
    """The launcher that flags ask for, with its files in a folder.

    Raises:
      UserError: names the flag that won't do.
    """
    submission.check_folder(folder)
    if given.launcher == "local":
        return Local(folder, given.jobs)
    return Slurm(folder, submission.parameters(given), given.max_timeouts, given.poll)


@contextlib.contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    """Has the processes that are started meanwhile never receive signals."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
