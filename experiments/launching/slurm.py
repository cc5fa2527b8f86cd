"""Runs commands as SLURM jobs, with submitit."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from absl import flags
from submitit.core.utils import FailedJobError
from submitit.helpers import Checkpointable, clean_env
from submitit.slurm.slurm import SlurmInfoWatcher

from experiments.runtime.errors import UserError

PARAMETERS = ("gpus_per_node", "cpus_per_task", "partition", "account", "qos", "constraint")
MAX_TIMEOUTS = 100  # how often a job is requeued at its time limit
# SLURM's states of jobs that do not start again.
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE"),
    *("FAILED", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"),
)
INTERRUPTED = ("NODE_FAIL", "PREEMPTED")  # states of jobs that SLURM may queue again


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of a command that submits jobs, as flags of `values`."""
    for name, default, lowest, described in (
        ("gpus_per_node", 1, 0, "GPUs per node; 0 for nodes without GPUs."),
        ("cpus_per_task", None, 1, "CPU cores per process."),
        ("mem_gb", None, 1, "Memory per node, in GB."),
        ("time_to_save", 120, 1, "Seconds before the time limit at which a run saves and stops."),
    ):
        flags.DEFINE_integer(name, default, described, lower_bound=lowest, flag_values=values)
    limit = "Time limit, such as 24:00:00, 2-00:00:00 or a number of minutes."
    flags.DEFINE_string("time", None, limit, flag_values=values)
    for name in ("partition", "account", "qos", "constraint"):
        flags.DEFINE_string(name, None, f"sbatch's --{name}.", flag_values=values)
    for name, described in (
        ("extra", "Another option of sbatch, such as reservation=vision or exclusive."),
        ("setup", "Shell command before the run, such as: module load cuda."),
    ):
        flags.DEFINE_multi_string(name, [], described, flag_values=values)
    dry_run = "Print what would be run or submitted, and write nothing."
    flags.DEFINE_boolean("dry_run", False, dry_run, flag_values=values)


def minutes(time: str | None, time_to_save: int) -> int:
    """Converts a time limit of sbatch to whole minutes.

    Args:
      time: `days-hours:minutes:seconds`, `hours:minutes:seconds` or minutes.
      time_to_save: seconds before the limit at which a run is told to stop.

    Raises:
      UserError: `time` has another form, or is not longer than `time_to_save`.
    """
    form = r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)|(?P<only>\d+)"
    found = re.fullmatch(form, time or "", re.ASCII)
    if not found:
        problem = f"--time is {time!r}" if time else "--time is missing"
        raise UserError(f"{problem}: use a limit such as 24:00:00, 2-00:00:00 or 90 (minutes)")
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    hours = 24 * part["days"] + part["hours"]
    limit = 60 * hours + part["minutes"] + part["seconds"] // 60 + part["only"]
    if 60 * limit <= time_to_save:
        raise UserError(
            f"--time={time} is too short: in whole minutes, it must exceed --time_to_save, "
            f"{time_to_save} seconds"
        )
    return limit


def parameters(values: flags.FlagValues) -> dict[str, Any]:
    """Converts flags to submitit's parameters; SLURM's defaults apply to flags that are not given.

    Raises:
      UserError: a flag has an invalid value.
    """
    extra: dict[str, Any] = {"requeue": True}  # also after a node has failed
    for option in values.extra:
        name, equals, value = option.lstrip("-").partition("=")
        if not name:
            raise UserError(f"--extra={option} has no name: use --extra=NAME or --extra=NAME=VALUE")
        extra[name] = value if equals else True
    given = {name: getattr(values, name) for name in PARAMETERS} | {
        "mem": f"{values.mem_gb}GB" if values.mem_gb else None,
        "setup": values.setup,
        "time": minutes(values.time, values.time_to_save),
        "signal_delay_s": values.time_to_save,
        # srun of SLURM 22.05 and 23.02 does not inherit it from sbatch.
        "srun_args": [f"--cpus-per-task={values.cpus_per_task}"] if values.cpus_per_task else None,
        "additional_parameters": extra,
    }
    return {name: value for name, value in given.items() if value}


class Job(Checkpointable):
    """Runs a command in its own process, and requeues the job at its time limit.

    SLURM sends SIGUSR2 before the limit. The command then gets SIGTERM, saves a checkpoint and
    ends, and submitit requeues the job, which starts the same command again. After a SIGTERM from
    SLURM, as from scancel, the command saves and the job ends.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def __call__(self) -> None:
        """Runs the command.

        Raises:
          CalledProcessError: the command failed.
          SystemExit: SLURM stopped it.
        """
        requeue: Any = signal.getsignal(signal.SIGUSR2)  # submitit's; only process 0 requeues
        received = set()
        # SLURM also signals the command, which inherits this setting and ignores SIGUSR2.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        process = subprocess.Popen(self.command, env=os.environ | {"PYTHONUNBUFFERED": "1"})

        def stop(number: int, _: FrameType | None) -> None:
            received.add(number)
            process.terminate()  # a run ignores a second SIGTERM

        signal.signal(signal.SIGUSR2, stop)
        signal.signal(signal.SIGTERM, stop)
        status = process.wait()
        if not status:
            return
        if not received:
            raise subprocess.CalledProcessError(status, self.command)
        if signal.SIGUSR2 in received:
            # Requeuing fails if SLURM itself has requeued the job.
            with contextlib.suppress(subprocess.CalledProcessError):
                requeue(signal.SIGUSR2, None)
                return
        # An exception would write a result, and submitit then takes the job as ended. But SLURM may
        # start it again: after a preemption, or if an administrator requeues it.
        sys.exit(128 + signal.SIGTERM)


class States(SlurmInfoWatcher):
    """submitit's states of jobs, by sacct at least every ten minutes.

    submitit takes a suspended job for one that has ended, and keeps NODE_FAIL for good.
    """

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether a job has ended and does not start again."""
        return self.get_state(job_id, mode).partition(" ")[0] in ENDED


class SubmittedJob(submitit.SlurmJob[None]):
    """submitit's job, with states as above."""

    watcher = States(delay_s=600)

    def is_interrupted(self) -> bool:
        """Whether SLURM has stopped the job, and may queue it again."""
        return self.watcher.get_state(self.job_id) in INTERRUPTED


class Executor(submitit.SlurmExecutor):
    """submitit's executor, which can also be created without SLURM, for dry runs."""

    job_class = SubmittedJob

    @classmethod
    def affinity(cls) -> int:
        """Says that SLURM is available, so that dry runs work anywhere."""
        return 2

    def script(self) -> str:
        """The script for sbatch."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def submit(self, job: Job) -> SubmittedJob:
        """Submits a job.

        Raises:
          UserError: SLURM refuses it, or the folder of the job cannot be written.
        """
        try:
            # submitit also prints the error that it raises.
            with clean_env(), contextlib.redirect_stderr(io.StringIO()):
                return super().submit(job)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from error
        except FailedJobError as error:
            raise UserError(f"sbatch rejected the job: {error}") from error


def make_executor(folder: Path, **given: Any) -> Executor:
    """An executor whose scripts, pickles and logs are in a folder; takes submitit's parameters.

    Raises:
      UserError: the folder's path has a character that SLURM or submitit replaces.
    """
    path = str(folder.absolute())  # submitit would expand a `~` folder
    for character in "%\n":
        if character in path:
            raise UserError(
                f"--workdir: SLURM cannot write logs to a path with {character!r}, got {path}; "
                "choose another folder, or rename it"
            )
    executor = Executor(path, max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(**given)
    return executor


def check_commands(*names: str) -> None:
    """Refuses a machine without SLURM.

    Raises:
      UserError: names the missing command.
    """
    for name in names:
        if shutil.which(name) is None:
            raise UserError(
                f"{name} is not on the PATH: use a login node of a SLURM cluster, or --dry_run"
            )
