"""Runs a sweep: many runs of one config that differ in a few fields, here or on a SLURM cluster.

    python -m scripts.sweep --config=configs/pmnist.py --sweep=configs/sweeps/pmnist_gamma.py
    python -m scripts.sweep --config=configs/pmnist.py --sweep=configs/sweeps/pmnist_gamma.py \
        --launcher=slurm --partition=gpu --time=12:00:00

`--dry_run` prints the commands, or what sbatch would be given, and does nothing. Every point is a
`python -m experiments.main` of its own, in a folder of `--workdir` that is named after its fields;
`--config.FIELD=VALUE` is for all of them. Points are checked before the first one starts. After
each that ends, `results.csv` has a row for each run, and `results.md` means over seeds.

The same command, started again, goes on: finished points stay, others go on from their checkpoints,
failed ones are tried again. However the sweep ended, nothing runs twice:

- Ctrl-C (SIGTERM, a terminal that closes) stops the points that run here, which save first. Jobs
  of a cluster stay in the queue; the sweep finds them there.
- Points that run here outlive a sweep that is killed by SIGKILL. One that is started again waits
  for them, and counts them among its `--jobs`.

Points that run here share its devices. JAX takes most of a GPU's memory: for more `--jobs` than one
on a GPU, set XLA_PYTHON_CLIENT_PREALLOCATE=false.

Config and sweep files are code, which is run. So are the pickles that submitit writes into `jobs/`
of the sweep's folder, and reads there when a job starts: let nobody else write into it. The sweep
itself reads no pickle.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from experiments.launching import launchers, runner, sweep_table, sweeps
from experiments.launching.sweeps import Point
from experiments.records import workdir
from experiments.runtime import cli, files, paths
from experiments.runtime.errors import UserError

SWEEP_NAME = "sweep.json"


def define_flags() -> None:
    """Defines the flags of the command."""
    from experiments import main as run  # which defines flags of a run: a sweep has its own

    for flag in list(flags.FLAGS.flags_by_module_dict()[run.__name__]):
        delattr(flags.FLAGS, flag.name)
    paths.DEFINE_path("sweep", None, "File with the points; see configs/sweeps.", required=True)
    paths.DEFINE_path(
        "workdir", None, "Folder of the sweep; by default runs/sweeps/ and the sweep file's name."
    )
    launchers.define_flags()


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line, the config's fields as a run does.

    Raises:
      UserError: there is no config.
    """
    from experiments import main as run

    words = run.parse_flags(argv)
    if not flags.FLAGS["config"].present:
        raise UserError("--config is missing: name the config file whose fields are swept")
    return words


def description(base: ConfigDict, points: list[Point]) -> dict[str, Any]:
    """What `sweep.json` says: the points, and the fields that they share and may not change."""
    shared = flatten_dict(json.loads(base.to_json_best_effort()), sep=".")
    fields = points[0].fields
    return {
        "fields": {k: v for k, v in shared.items() if k not in (*fields, *workdir.FREE_FIELDS)},
        "points": json.loads(json.dumps({point.name: point.fields for point in points})),
    }


def check_folder(folder: Path, described: dict[str, Any]) -> None:
    """Refuses a folder that cannot be, or must not be, that of this sweep. Points may be added.

    Raises:
      UserError: it holds another sweep, or a run, or is not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is not a folder")
    if (folder / "config.json").exists():
        raise UserError(f"--workdir={folder} is the folder of a run: choose another for the sweep")
    if not (folder / SWEEP_NAME).exists():
        return
    theirs = files.read_json(folder / SWEEP_NAME)
    if gone := sorted(theirs["points"].keys() - described["points"].keys()):
        raise UserError(
            f"--workdir={folder} holds another sweep, which has a point {gone[0]}: choose another "
            "workdir"
        )
    before, now = theirs["fields"], described["fields"]
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            raise UserError(
                f"--workdir={folder} holds the sweep of another config: there config.{name} is "
                f"{before[name]}, here it is {now[name]}; choose another workdir"
            )


def main(_: list[str]) -> None:
    """Checks all points, runs them, and tells what they came to; exits with 1 if any failed."""
    given = flags.FLAGS
    folder = Path(given.workdir or f"runs/sweeps/{Path(given.sweep).stem}")
    swept = sweeps.load(given.sweep)
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    for field in overrides:
        if all(field in point for point in swept):
            raise UserError(f"--config.{field} is set by each point of {given.sweep}: leave it out")
    points = sweeps.make_points(given.config, swept, folder)
    described = description(given.config, points)
    check_folder(folder, described)
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    commands = {p.name: runner.command_of(p, config_file, overrides) for p in points}
    launcher = launchers.make_launcher(given, folder)
    if given.dry_run:
        runner.show(points, commands, launcher)
        return
    launcher.check()
    with workdir.in_use(folder):
        files.write_json(folder / SWEEP_NAME, described)
        write = functools.partial(sweep_table.write, points, folder=folder)
        sweep = runner.Sweep(points, commands, launcher, given.retries, write)
        table = sweep.run()
    print(f"\n{table}\nOf each run: {folder / sweep_table.CSV_NAME}")
    sweep.exit_if_failed()


if __name__ == "__main__":
    cli.run(main, define_flags, parse_flags)
