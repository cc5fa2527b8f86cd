"""Submits a training run to a SLURM cluster, on one node or several.

    python -m scripts.slurm --time=24:00:00 --nodes=2 --gpus_per_node=8 --partition=gpu \\
        --config=configs/pmnist.py --workdir=runs/pmnist

All other flags are those of `python -m experiments.main`, which each process runs with
`--distributed`. There is one process for each GPU, as JAX has it under SLURM, and one for each node
where there are none. Before the time limit the run saves a checkpoint, and is queued again, until
it is finished. `--dry_run` prints what would be submitted.

The workdir and the data have to lie where all nodes see them. Logs are in the folder `slurm` of the
workdir, with what submitit, by pickle, tells the job to run.
"""

import importlib
import pkgutil
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from absl import flags
from submitit.core.utils import FailedJobError

from experiments import config, errors, main, parallel, tasks, workdir
from experiments.errors import UserError
from scripts.slurm_job import Job

OWN = flags.FlagValues()  # those that are not of experiments.main
PARAMETERS = (
    "nodes",
    "gpus_per_node",
    "cpus_per_task",
    "partition",
    "account",
    "qos",
    "constraint",
)


def _define_flags() -> None:
    def number(name: str, default: int | None, described: str) -> None:
        flags.DEFINE_integer(name, default, described, lower_bound=1, flag_values=OWN)

    def text(name: str, described: str) -> None:
        flags.DEFINE_string(name, None, described, flag_values=OWN)

    number("nodes", 1, "Nodes of the cluster.")
    number("gpus_per_node", None, "GPUs of each, with a process each; by default none.")
    number("cpus_per_task", None, "Cores of each process.")
    number("mem_gb", None, "Memory of each node.")
    text("time", "Time limit, as 24:00:00, 2-00:00:00 or a number of minutes.")
    for name in ("partition", "account", "qos", "constraint", "job_name"):
        text(name, "As sbatch has it.")
    flags.DEFINE_multi_string(
        "setup", None, "Command of a shell before the run, as: module load cuda.", flag_values=OWN
    )
    number("time_to_save", 120, "Seconds before the time limit at which the run is told to stop.")
    number("max_timeouts", 100, "So often a run that reached its time limit is queued again.")
    flags.DEFINE_boolean("dry_run", False, "Print what would be submitted.", flag_values=OWN)


_define_flags()


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; returns the part that is for `experiments.main`."""
    OWN.set_gnu_getopt(True)
    rest = OWN(argv, known_only=True)
    flags.FLAGS.append_flag_values(OWN)  # for --help, and to tell what a misspelt flag may mean
    main.parse_flags(rest)
    return rest


def minutes(time: str | None) -> int:
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
    if 60 * limit <= OWN.time_to_save:
        raise UserError(
            f"--time={time} is too short: the run is told to stop {OWN.time_to_save} seconds "
            "before (--time_to_save)"
        )
    return limit


def check(base: config.ConfigDict, folder: Path) -> None:
    """Refuses what the run would refuse when it starts, as far as that needs no data.

    Raises:
      UserError: config or workdir won't do.
    """
    config.check(base)
    parallel.check(base, OWN.nodes * (OWN.gpus_per_node or 1))
    names = tuple(module.name for module in pkgutil.iter_modules(tasks.__path__))
    config.one_of("config.task", base.task, names)
    importlib.import_module(f"experiments.tasks.{base.task}").check(base)
    kinds = config.model_kinds(base)
    for kind in kinds:
        own = base.copy_and_resolve_references()
        own.model.kind = kind
        workdir.check(own, folder / kind if len(kinds) > 1 else folder)


def parameters(name: str) -> dict[str, Any]:
    """What submitit is told of the job, by its own names."""
    given = {key: OWN[key].value for key in PARAMETERS if OWN[key].value is not None}
    if OWN.mem_gb:
        given["mem"] = f"{OWN.mem_gb}GB"
    if OWN.setup:
        given["setup"] = OWN.setup
    return given | {
        "job_name": OWN.job_name or name,
        "time": minutes(OWN.time),
        "ntasks_per_node": OWN.gpus_per_node or 1,
        "signal_delay_s": OWN.time_to_save,
        "additional_parameters": {"requeue": True},  # also when a node fails
    }


class Executor(submitit.SlurmExecutor):
    """submitit's, which can be made without SLURM too, for `--dry_run`."""

    @classmethod
    def affinity(cls) -> int:
        """That of a cluster."""
        return 2

    def script(self) -> str:
        """What sbatch is given."""
        return self._make_submission_file_text(self._submitit_command_str, "")


def submit(arguments: list[str]) -> None:
    """Submits a run with these arguments of `experiments.main`, or prints what that would be."""
    given = flags.FLAGS
    folder = Path(given.workdir or main.default_workdir())
    check(given.config, folder)
    executor = Executor(folder / "slurm", max_num_timeout=OWN.max_timeouts)
    executor.update_parameters(**parameters(folder.name))
    command = [sys.executable, "-m", "experiments.main", "--distributed", *arguments]
    if OWN.dry_run:
        print(f"{executor.script()}\n# which has each process run\n{shlex.join(command)}")
        return
    for program in ("sbatch", "srun"):
        if not shutil.which(program):
            raise UserError(
                f"there is no {program} here: call this on a login node of a SLURM cluster, or see "
                "what it would do, with --dry_run"
            )
    try:
        job = executor.submit(Job(command))
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be written: {error.strerror}") from error
    except FailedJobError as error:
        raise UserError(f"sbatch refuses the job: {error}") from error
    print(f"Job {job.job_id}: {shlex.join(command)}\nLogs: {job.paths.stdout}")


if __name__ == "__main__":
    errors.run(lambda argv: submit(argv[1:]), parse_flags)
