"""Reproduces a table or a figure of the paper: makes its runs, and compares them with the paper.

    python -m scripts.reproduce                          # what there is to reproduce
    python -m scripts.reproduce figure_gradient_norm
    python -m scripts.reproduce table_mnist --seeds=3    # a few minutes of each run
    python -m scripts.reproduce table_mnist --seeds=3 --budget=full --data_dir=data
    python -m scripts.reproduce table_mnist --seeds=3 --budget=full --data_dir=/shared/data \\
        --workdir=/shared/runs --launcher=slurm --partition=gpu --time=24:00:00

Each run is a `python -m experiments.main` in a folder of `--workdir`. Finished runs are reused, and
others are resumed. Runs are launched like the points of a sweep (scripts/sweep.py): `--jobs` at
once on this machine, or as SLURM jobs. Logs are in `jobs/` of the workdir. `--dry_run` prints the
commands.

`--budget=minutes` makes 500 updates on MNIST, 10 on text8 and 100 on others, which takes minutes on
two CPU cores. `--budget=full` makes the paper's number of updates and is meant for a GPU. A larger
budget continues the runs of a smaller one. `--budget=none` makes no runs and shows existing ones.

Writes `<name>.md` and `<name>.png` into `--output`, before the first run and after each run.
scripts/report.py makes one page of all tables and figures.
"""

import functools
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments.launching import launchers, runner
from experiments.launching.sweeps import Point
from experiments.records import runs, workdir
from experiments.reporting import pictures
from experiments.reporting.item import Item, find
from experiments.reporting.items import ITEMS
from experiments.runtime import cli, files, markdown, paths
from experiments.runtime.errors import UserError, unknown_name

# Updates with --budget=minutes, by config; 100 with others.
MINUTES = {"mnist": 500, "pmnist": 500, "text8": 10}


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum("budget", "minutes", ["none", "minutes", "full"], "Updates of each run.")
    flags.DEFINE_integer("seeds", 1, "Runs of each experiment, with seeds from 1.", lower_bound=1)
    paths.DEFINE_path("data_dir", "data", "Folder of the data.")
    paths.DEFINE_path("workdir", "runs/reproduce", "Folder of the runs.")
    paths.DEFINE_path("output", None, "Folder of table and picture; by default the workdir.")
    launchers.define_flags()


def make_runs(item: Item, given: Any, folder: Path) -> tuple[list[Point], dict[str, list[str]]]:
    """The runs of an item, and their commands by name, without runs past the budget's updates.

    Raises:
      UserError: the folder of a run holds another run.
    """
    made, commands = [], {}
    for experiment in item.experiments:
        name, colon, variant = experiment.config.partition(":")
        whole = experiment.get_config().num_updates
        updates = whole if given.budget == "full" else min(MINUTES.get(name, 100), whole)
        for seed in range(1, given.seeds + 1):
            place = folder / str(experiment) / f"seed_{seed}"
            if (place / "config.json").exists() and runs.Run(place).updates > updates:
                continue
            fields = {
                **dict(experiment.fields),
                "model.kind": experiment.kind,
                "seed": seed,
                "num_updates": updates,
                "data_dir": given.data_dir,
            }
            config = experiment.get_config()
            config.update_from_flattened_dict(fields)
            workdir.check(config, place)
            short = str(place.relative_to(folder))
            run = Point(short, fields, config, place, {experiment.kind: place})
            made.append(run)
            commands[short] = runner.command_of(run, f"configs/{name}.py{colon}{variant}", {})
    return made, commands


def write(name: str, folder: Path, output: Path, data_dir: str) -> str:
    """Writes the table and the picture of an item; returns the Markdown."""
    item = ITEMS[name]
    table, figure = item.show(find([item], folder), data_dir)
    output.mkdir(parents=True, exist_ok=True)
    title = markdown.escape(item.title)
    parts = [f"# {title}", *filter(None, [markdown.escape(item.remark)])]
    if table is not None:
        parts.append(markdown.table(*table))
    if figure is not None:
        pictures.save(figure, output / f"{name}.png")
        parts.append(f"![{title}]({name}.png)")
    if table is None and figure is None:
        parts.append("No run has results to show yet.")
    text = "\n\n".join(parts) + "\n"
    files.write_text(output / f"{name}.md", text)
    return text


def main(argv: list[str]) -> None:
    """Makes the runs, then the table or figure."""
    given = flags.FLAGS
    if len(argv) == 1:
        for name, item in ITEMS.items():
            print(f"{name:30} {item.title}")
        return
    if len(argv) > 2:
        raise UserError(f"name one table or figure, not several: {', '.join(argv[1:])}")
    name, folder = argv[1], Path(given.workdir)
    if name not in ITEMS:
        raise UserError(unknown_name("the table or figure", name, ITEMS))
    output = Path(given.output or folder)
    points, commands = make_runs(ITEMS[name], given, folder) if given.budget != "none" else ([], {})
    launcher = launchers.make_launcher(given, folder)
    if given.dry_run:
        runner.show(points, commands, launcher)
        return
    renew = functools.partial(write, name, folder, output, given.data_dir)
    errors = {}
    if points:
        renew()  # raises before the runs if the output cannot be written
        errors = runner.run(points, commands, launcher, lambda _: renew())
    print(f"{renew()}\nWritten to {output}/{name}.md")
    if errors:
        sys.exit(f"error: {len(errors)} of {len(points)} points failed")


if __name__ == "__main__":
    cli.run(main, define_flags, flags.FLAGS)
