"""Where the points of a sweep run: on this machine, or as SLURM jobs."""

import math
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments.launching import slurm
from experiments.launching.sweeps import Point
from experiments.runtime.errors import tell

FILES_ARRIVE_S = 60  # seconds within which files written on a cluster's node become visible here
REQUEUED_S = 1200  # seconds within which SLURM queues an interrupted job again, if it does


def define_flags() -> None:
    """Defines the flags of a command that runs points."""
    flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "Where runs execute.")
    at_once = "Runs at a time; by default one on this machine, all with SLURM."
    flags.DEFINE_integer("jobs", None, at_once, lower_bound=1)
    slurm.define_flags(flags.FLAGS)


class Local:
    """Runs points on this machine, each in its own process. They share the devices."""

    interval = 0.5  # seconds between polls of the processes

    def __init__(self, folder: Path, at_once: int) -> None:
        """Creates a launcher for the sweep in `folder` that runs `at_once` points together."""
        self.folder = folder
        self.at_once = at_once
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def find(self, point: Point) -> bool:
        """Always False. Points of a killed sweep are not tracked; a lock refuses a second start."""
        return False

    def start(self, point: Point, command: list[str]) -> None:
        """Starts the command of a point."""
        log = self.log(point)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # a process of a killed sweep may still write to it
        with log.open("wb") as file:
            self._processes[point.name] = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=0,  # Ctrl-C reaches the sweep alone, which calls `stop`
            )

    def running(self, point: Point) -> bool:
        """Whether the process of a point runs."""
        return self._processes[point.name].poll() is None

    def ending(self, point: Point) -> str:
        """How the process of a point ended."""
        status = self._processes[point.name].wait()
        return f"status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"

    def stop(self) -> None:
        """Stops all processes; runs save a checkpoint first."""
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            process.terminate()
        if running:
            tell(f"waiting for {len(running)} runs to save")
        for process in running:
            process.wait()

    def log(self, point: Point) -> Path:
        """The log of a point's latest process."""
        return self.folder / "jobs" / f"{point.name}.log"

    def describe(self, point: Point, command: list[str]) -> str:
        """The output of a dry run: the command."""
        return shlex.join(command)


class Slurm:
    """Submits each point of a sweep as its own job.

    Jobs stay in the queue when the sweep ends. A later sweep finds them by their pickles.
    """

    interval = 10.0

    def __init__(self, folder: Path, values: flags.FlagValues) -> None:
        """Creates a launcher for the sweep in `folder`, with `--jobs` and SLURM's options.

        Raises:
          UserError: a flag or the folder is invalid, or there is no SLURM.
        """
        self.folder = folder
        self.at_once = values.jobs or math.inf
        self._parameters = slurm.parameters(values)
        self._jobs: dict[str, slurm.SubmittedJob] = {}
        # When a point's job was first seen to have ended, or to be interrupted.
        self._ended: dict[tuple[str, bool], float] = {}
        slurm.make_executor(folder)  # checks the path
        if not values.dry_run:
            slurm.check_commands("sbatch", "srun", "sacct", "scancel")

    def find(self, point: Point) -> bool:
        """Whether a job that an earlier sweep submitted for a point is queued or runs."""
        folder = self._executor(point).folder
        ids = [path.name.partition("_")[0] for path in folder.glob("*_submitted.pkl")]
        if not ids:
            return False
        self._jobs[point.name] = job = slurm.SubmittedJob(folder, max(ids, key=int))
        if job.is_interrupted():  # if SLURM queued it again, it would meet its successor
            subprocess.run(["scancel", job.job_id], capture_output=True, check=False)
            return False
        if job.done():
            return False
        print(
            f"{point.name}: job {job.job_id} is {job.state}; to submit a new one, "
            f"run scancel {job.job_id} and delete {folder}",
            flush=True,
        )
        return True

    def start(self, point: Point, command: list[str]) -> None:
        """Submits the command of a point.

        Raises:
          UserError: SLURM refuses it.
        """
        self._jobs[point.name] = self._executor(point).submit(slurm.Job(command))

    def running(self, point: Point) -> bool:
        """Whether a point is queued, runs or may do so again, or its results may still appear."""
        job = self._jobs[point.name]
        interrupted = job.is_interrupted()
        if not job.done() and not interrupted:
            self._ended.pop((point.name, True), None)
            return True
        ended = self._ended.setdefault((point.name, interrupted), time.monotonic())
        wait = REQUEUED_S if interrupted else FILES_ARRIVE_S
        return not point.finished() and time.monotonic() - ended < wait

    def ending(self, point: Point) -> str:
        """How a point's job ended."""
        job = self._jobs[point.name]
        return f"job {job.job_id} {job.state}"

    def stop(self) -> None:
        """Leaves jobs in the queue, and tells how to cancel them."""
        jobs = self._jobs.values()
        ids = [job.job_id for job in jobs if not (job.done() or job.is_interrupted())]
        if ids:
            tell(f"jobs stay queued; to cancel them: scancel {' '.join(ids)}")

    def log(self, point: Point) -> Path:
        """The error log of a point's job."""
        return self._jobs[point.name].paths.stderr

    def describe(self, point: Point, command: list[str]) -> str:
        """The output of a dry run: the command and the script for sbatch."""
        return f"{shlex.join(command)}\n\n{self._executor(point).script()}"

    def _executor(self, point: Point) -> slurm.Executor:
        name = f"{self.folder.name}/{point.name}"
        folder = self.folder / "jobs" / point.name
        return slurm.make_executor(folder, job_name=name, **self._parameters)


Launcher = Local | Slurm


def make_launcher(given: Any, folder: Path) -> Launcher:
    """The launcher that flags ask for, with its files in a folder.

    Raises:
      UserError: a flag or the folder is invalid.
    """
    return Local(folder, given.jobs or 1) if given.launcher == "local" else Slurm(folder, given)
