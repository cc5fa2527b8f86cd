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
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import config, main, parallel, tasks
from experiments.launching import submission
from experiments.launching.submission import Executor, Job
from experiments.records import workdir
from experiments.runtime import checks, cli

OWN = flags.FlagValues()  # those that are not of experiments.main
submission.define_flags(OWN)
flags.DEFINE_integer("nodes", 1, "Nodes of the cluster.", lower_bound=1, flag_values=OWN)
flags.DEFINE_string("job_name", None, "By default that of the workdir.", flag_values=OWN)
flags.DEFINE_boolean("dry_run", False, "Print what would be submitted.", flag_values=OWN)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; returns the part that is for `experiments.main`."""
    OWN.set_gnu_getopt(True)
    rest = OWN(argv, known_only=True)
    flags.FLAGS.append_flag_values(OWN)  # for --help, and to tell what a misspelt flag may mean
    for name in OWN:
        flags.FLAGS.register_flag_by_module(argv[0], OWN[name])
    main.parse_flags(rest)
    return rest


def check(base: config.ConfigDict, folder: Path) -> None:
    """Refuses what the run would refuse when it starts, as far as that needs no data.

    Raises:
      UserError: config or workdir won't do.
    """
    config.check(base)
    parallel.check(base, OWN.nodes * (OWN.gpus_per_node or 1))
    names = tuple(module.name for module in pkgutil.iter_modules(tasks.__path__))
    checks.one_of("config.task", base.task, names)
    importlib.import_module(f"experiments.tasks.{base.task}").check(base)
    kinds = config.model_kinds(base)
    for kind in kinds:
        own = base.copy_and_resolve_references()
        own.model.kind = kind
        workdir.check(own, folder / kind if len(kinds) > 1 else folder)


def submit(arguments: list[str]) -> None:
    """Submits a run with these arguments of `experiments.main`, or prints what that would be."""
    given = flags.FLAGS
    folder = Path(given.workdir or main.default_workdir())
    check(given.config, folder)
    submission.check_folder(folder)
    executor = Executor((folder / "slurm").absolute(), max_num_timeout=OWN.max_timeouts)
    executor.update_parameters(
        nodes=OWN.nodes,
        ntasks_per_node=OWN.gpus_per_node or 1,
        job_name=OWN.job_name or folder.name,
        **submission.parameters(OWN),
    )
    command = [sys.executable, "-m", "experiments.main", "--distributed", *arguments]
    if OWN.dry_run:
        print(f"{executor.script()}\n# which has each process run\n{shlex.join(command)}")
        return
    submission.check_commands("sbatch", "srun")
    job = executor.submit(Job(command))
    print(f"Job {job.job_id}: {shlex.join(command)}\nLogs: {job.paths.stdout}")


if __name__ == "__main__":
    cli.run(lambda argv: submit(argv[1:]), parse=parse_flags)
