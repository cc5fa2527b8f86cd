"""Submits a training run to a SLURM cluster, on one node or several.

    python -m scripts.slurm --time=24:00:00 --nodes=2 --gpus_per_node=8 --partition=gpu \\
        --config=configs/text8.py --workdir=runs/text8

All other flags are those of `python -m experiments.main`, which each process runs with
`--distributed`. There is one process per GPU, as JAX expects under SLURM, or one per node without
GPUs. Before the time limit the run saves a checkpoint and is queued again, until it has finished.
`--dry_run` prints what would be submitted.

All nodes must see the workdir and the data. Logs are in the workdir's folder `slurm`, beside
submitit's pickles, from which the job loads its command.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import main
from experiments.launching import slurm, sweeps
from experiments.runtime import cli


def define_flags() -> None:
    """Defines the flags of a run and those of a job."""
    main.define_flags()
    define_own_flags(flags.FLAGS)


def define_own_flags(values: flags.FlagValues) -> None:
    """Defines the flags of a job in `values`."""
    flags.DEFINE_integer("nodes", 1, "Number of nodes.", lower_bound=1, flag_values=values)
    described = "Name of the job; by default that of the workdir."
    flags.DEFINE_string("job_name", None, described, flag_values=values)
    slurm.define_flags(values)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; returns the part that is for `experiments.main`."""
    main.parse_flags(argv)
    own = flags.FlagValues()
    define_own_flags(own)
    own.set_gnu_getopt(True)
    return own(argv, known_only=True)[1:]


def submit(arguments: list[str]) -> None:
    """Submits a run with these arguments of `experiments.main`; a dry run only prints it."""
    given = flags.FLAGS
    folder = Path(given.workdir or main.default_workdir())
    per_node = given.gpus_per_node or 1
    sweeps.check_run(given.config, folder, given.nodes * per_node)
    executor = slurm.make_executor(
        folder / "slurm",
        nodes=given.nodes,
        ntasks_per_node=per_node,
        job_name=given.job_name or folder.name,
        **slurm.parameters(given),
    )
    command = [sys.executable, "-m", "experiments.main", "--distributed", *arguments]
    if given.dry_run:
        print(f"{executor.script()}\n# which runs in each process\n{shlex.join(command)}")
        return
    slurm.check_commands("sbatch", "srun")
    job = executor.submit(slurm.Job(command))
    print(f"Job {job.job_id}: {shlex.join(command)}\nLogs: {job.paths.stdout}")


if __name__ == "__main__":
    cli.run(submit, define_flags, parse_flags)
