"""Commands as jobs: what scripts/slurm.py and scripts/sweep.py have in common, by submitit."""

import contextlib
import fcntl
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from absl import flags
from submitit.core.utils import FailedJobError
from submitit.helpers import DelayedSubmission, clean_env

from experiments.runtime.errors import UserError

STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)  # by SIGTERM: after a checkpoint, or before one
PARAMETERS = ("gpus_per_node", "cpus_per_task", "partition", "account", "qos", "constraint")


class Job:
    """Runs a command in a process of its own, and has it queued again when its time is over.

    SLURM sends SIGUSR2 some time before the limit. The command then gets SIGTERM, upon which it
    saves a checkpoint and ends, and submitit has the same job queued again, from where it goes on.
    After a SIGTERM of SLURM, as by scancel, it is not. Whether a preempted job is queued again, is
    for the cluster to say.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str | None] | None = None,
        lock: Path | None = None,
    ) -> None:
        """Takes `environment` as changes to that of the job; None removes a variable.

        `lock` is a file that is locked for as long as this or the command runs, also if the other
        is killed. It has the number of the command's process.
        """
        self.command = command
        self.environment = environment or {}
        self.lock = lock
        self.folder = os.getcwd()

    def __call__(self) -> None:
        """Ends with the status of the command, if that has failed."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}
        environment = {name: value for name, value in environment.items() if value is not None}
        requeue = signal.getsignal(signal.SIGUSR2)  # of submitit: does it in the first process
        received = []
        with contextlib.ExitStack() as stack:
            kept = []
            if self.lock is not None:
                file = stack.enter_context(self.lock.open("a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                kept.append(file.fileno())
            # SLURM sends it to every process of a job. It would kill the command, were it not
            # ignored in what is started now.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, pass_fds=kept
            )

            def tell(number: int, _: Any) -> None:
                received.append(number)
                process.terminate()  # a run that has heard of it already takes it for the same

            signal.signal(signal.SIGUSR2, tell)
            signal.signal(signal.SIGTERM, tell)
            if self.lock is not None:
                file.write(str(process.pid))
                file.flush()
            status = process.wait()
        if signal.SIGUSR2 in received and status in STOPPED:
            requeue(signal.SIGUSR2, None)
        elif status < 0:
            print(f"error: ended by {signal.Signals(-status).name}", file=sys.stderr)
            sys.exit(128 - status)
        elif status:
            sys.exit(status)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit is to run in the job that is queued again: the same."""
        return DelayedSubmission(self)


class Executor(submitit.SlurmExecutor):
    """submitit's, which can be made without SLURM too, to show what it would do."""

    @classmethod
    def affinity(cls) -> int:
        """That of a cluster."""
        return 2

    def script(self) -> str:
        """What sbatch is given."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def submit(self, job: Job) -> submitit.SlurmJob:
        """Submits a job.

        Raises:
          UserError: SLURM refuses it, or the folder of the job cannot be written.
        """
        try:
            # submitit prints what it raises, too.
            with clean_env(), contextlib.redirect_stderr(io.StringIO()):
                return super().submit(job)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from error
        except FailedJobError as error:
            raise UserError(f"sbatch refuses the job: {error}") from error


def define_flags(values: flags.FlagValues) -> None:
    """What a user says of SLURM jobs, on any command line that submits some."""

    def number(name: str, default: int | None, described: str, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, described, lower_bound=least, flag_values=values)

    def texts(names: Sequence[str], described: str) -> None:
        for name in names:
            flags.DEFINE_string(name, None, described, flag_values=values)

    def several(name: str, described: str) -> None:
        flags.DEFINE_multi_string(name, [], described, flag_values=values)

    number("gpus_per_node", 1, "GPUs of each node; 0 where there are none.", least=0)
    number("cpus_per_task", None, "Cores of each process.")
    number("mem_gb", None, "Memory of each node.")
    texts(["time"], "Time limit, as 24:00:00, 2-00:00:00 or a number of minutes.")
    number("time_to_save", 120, "Seconds before the time limit at which a run is told to stop.")
    number("max_timeouts", 100, "So often a run that reached its time limit is queued again.")
    texts(["partition", "account", "qos", "constraint"], "As sbatch has it.")
    several("extra", "Another option of sbatch, as NAME=VALUE, such as reservation=vision.")
    several("setup", "Command of a shell before the run, as: module load cuda.")


def minutes(time: str | None, time_to_save: int) -> int:
    """A time limit as sbatch has it, in whole minutes.

    Raises:
      UserError: it is none, or it leaves no time before that to save a checkpoint.
    """
    form = r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)|(?P<only>\d+)"
    found = re.fullmatch(form, time or "", re.ASCII)
    if not found:
        problem = f"--time is {time!r}" if time else "--time is missing"
        raise UserError(f"{problem}: give a limit like 24:00:00, 2-00:00:00, or in minutes")
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    hours = 24 * part["days"] + part["hours"]
    limit = 60 * hours + part["minutes"] + part["seconds"] // 60 + part["only"]
    if 60 * limit <= time_to_save:
        raise UserError(
            f"--time={time} is too short: the run is told to stop {time_to_save} seconds before "
            "(--time_to_save)"
        )
    return limit


def parameters(values: flags.FlagValues) -> dict[str, Any]:
    """The flags as submitit names them; those that are not given are left to SLURM.

    Raises:
      UserError: names the flag that won't do.
    """
    given = {name: getattr(values, name) for name in PARAMETERS}
    extra: dict[str, Any] = {"requeue": True}  # also when a node fails
    for option in values.extra:
        name, equals, value = option.lstrip("-").partition("=")
        if not equals:
            raise UserError(f"--extra={option} has no value: write --extra=NAME=VALUE")
        extra[name] = value
    given |= {
        "mem": f"{values.mem_gb}GB" if values.mem_gb else None,
        "setup": values.setup,
        "time": minutes(values.time, values.time_to_save),
        "signal_delay_s": values.time_to_save,
        "additional_parameters": extra,
    }
    return {name: value for name, value in given.items() if value}


def check_folder(folder: Path) -> None:
    """Refuses a folder in which jobs could not have their logs and pickles.

    Raises:
      UserError: its path has what SLURM and submitit take for a pattern, or for the end of a line.
    """
    path = str(folder.absolute())
    for character in "%\n":
        if character in path:
            raise UserError(
                f"--workdir: jobs cannot write logs to a path with {character!r}, got {path}; "
                "choose another folder, or rename it"
            )


def check_commands(*names: str) -> None:
    """Refuses a machine that has no SLURM.

    Raises:
      UserError: names the command that is missing.
    """
    for name in names:
        if shutil.which(name) is None:
            raise UserError(
                f"there is no {name} here: call this on a login node of a SLURM cluster, or see "
                "what it would do, with --dry_run"
            )
