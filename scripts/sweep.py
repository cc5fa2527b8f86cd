"""Runs a sweep: runs of one config that differ in a few fields, here or on a SLURM cluster.

    python -m scripts.sweep --config=configs/pmnist.py --sweep=configs/sweeps/pmnist_gamma.py
    python -m scripts.sweep --config=configs/pmnist.py --sweep=configs/sweeps/pmnist_gamma.py \\
        --launcher=slurm --partition=gpu --time=12:00:00

`--dry_run` only prints the commands, or the scripts for sbatch. Every point is its own
`python -m experiments.main`, in a folder of `--workdir` that is named after the point's fields.
`--config.FIELD=VALUE` applies to all points. All points are checked before the first one starts.
After each point, `results.csv` is written with a row per run, and `results.md` with means over
seeds.

Run the same command again to resume: it skips finished points, and continues stopped and failed
ones from their checkpoints. Ctrl-C, SIGTERM and a closed terminal stop the points that run
here, which save first. Jobs of a cluster stay in the queue, where the same command finds them.

Points that run here share the machine's devices. JAX reserves most of a GPU's memory: for several
`--jobs` on one GPU, set XLA_PYTHON_CLIENT_PREALLOCATE=false.

Config and sweep files are executed as Python code. SLURM jobs load pickles that submitit writes to
`jobs/` in the sweep's folder: let nobody else write there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import main as run
from experiments.launching import launchers, runner, sweep_table, sweeps
from experiments.runtime import cli, paths
from experiments.runtime.errors import UserError


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("sweep", None, "File with the points; see configs/sweeps.", required=True)
    paths.DEFINE_path(
        "workdir", None, "Folder of the sweep; by default runs/sweeps/ and the sweep file's name."
    )
    launchers.define_flags()


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line, with the config's fields as for a run.

    Raises:
      UserError: there is no config.
    """
    words = run.parse_flags(argv)
    if not flags.FLAGS["config"].present:
        raise UserError("--config is missing: name the config file whose fields are swept")
    return words


def main(_: list[str]) -> None:
    """Checks all points, runs them and prints their results; exits with 1 if any failed."""
    given = flags.FLAGS
    folder = Path(given.workdir or f"runs/sweeps/{Path(given.sweep).stem}")
    swept = sweeps.load(given.sweep)
    overrides = config_flags.get_override_values(given["config"])
    for field in overrides:
        if all(field in point for point in swept):
            raise UserError(f"--config.{field} is set by each point of {given.sweep}: leave it out")
    points = sweeps.make_points(given.config, swept, folder)
    config_file = config_flags.get_config_filename(given["config"])
    commands = {p.name: runner.command_of(p, config_file, overrides) for p in points}
    launcher = launchers.make_launcher(given, folder)
    if given.dry_run:
        runner.show(points, commands, launcher)
        return
    errors = runner.run(
        points, commands, launcher, lambda errors: sweep_table.write(points, errors, folder)
    )
    table = sweep_table.write(points, errors, folder)
    print(f"\n{table}\nResults of each run: {folder / sweep_table.CSV_NAME}")
    if errors:
        sys.exit(f"error: {len(errors)} of {len(points)} points failed")


if __name__ == "__main__":
    cli.run(main, define_flags, parse_flags)
