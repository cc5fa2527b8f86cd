"""Reproduces a table or a figure of the paper: makes its runs, and shows it beside the paper's.

    python -m scripts.reproduce                          # what there is to reproduce
    python -m scripts.reproduce figure_gradient_norm
    python -m scripts.reproduce table_mnist --seeds=3    # a few minutes of each run
    python -m scripts.reproduce table_mnist --seeds=3 --budget=full --data_dir=data

Runs are those of `python -m experiments.main`, in `--workdir`, made one after the other: finished
ones are found again, others go on where they are. With `--budget=minutes` each run does the first
few hundred updates, which on two cores of a CPU takes minutes; the paper's number of updates,
`--budget=full`, wants a GPU. A larger budget goes on from a smaller one. `--budget=none` makes no
runs, and shows those there are.

Writes `<name>.md` and `<name>.png` into `--output`. scripts/report.py makes a page of everything.
"""

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, paths, runs, workdir
from experiments.errors import UserError, unknown_name
from experiments.runs import Experiment
from experiments.sweeps import argument
from scripts import pictures
from scripts.paper_items import MINUTES, Item, items


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum("budget", "minutes", ["none", "minutes", "full"], "How far runs go.")
    flags.DEFINE_integer("seeds", 1, "Runs of each experiment, with seeds from 1.", lower_bound=1)
    paths.DEFINE_path("data_dir", "data", "Folder of the data.")
    paths.DEFINE_path("workdir", "runs/reproduce", "Folder of the runs.")
    paths.DEFINE_path("output", None, "Folder of table and picture; by default the workdir.")
    flags.DEFINE_boolean("dry_run", False, "Print the commands of the runs, and do nothing.")


def command_of(
    experiment: Experiment, seed: int, updates: int, evaluation: dict[str, Any], folder: Path
) -> list[str]:
    """The command of a run. It may be given again, with more updates too."""
    fields = {
        **dict(experiment.fields),
        "model.kind": experiment.kind,
        "seed": seed,
        "num_updates": updates,
        **evaluation,
        "data_dir": flags.FLAGS.data_dir,
    }
    name, colon, variant = experiment.config.partition(":")
    return [
        *("python", "-m", "experiments.main"),
        f"--config=configs/{name}.py{colon}{variant}",
        f"--workdir={folder}",
        *(f"--config.{name}={argument(value)}" for name, value in fields.items()),
    ]


def commands(item: Item, budget: str, seeds: int, folder: Path) -> list[list[str]]:
    """The commands of the runs of an item, of which one that came further is not among them."""
    found = []
    for experiment in item.experiments:
        whole = experiment.get_config().num_updates
        minutes = MINUTES[experiment.config.partition(":")[0]]
        updates = whole if budget == "full" else min(minutes, whole)
        for seed in range(1, seeds + 1):
            place = folder / str(experiment) / f"seed_{seed}"
            there = runs.Run(place).updates if (place / "config.json").exists() else 0
            if there <= updates:
                found.append(command_of(experiment, seed, updates, item.evaluation, place))
    return found


def wait_for(command: list[str]) -> int:
    """Runs a command; returns its exit status. To signals it answers itself, and saves."""
    process = subprocess.Popen(command)
    # Ctrl-C reaches it without help.
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
    earlier = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def write(name: str, item: Item, folder: Path, output: Path) -> str:
    """Writes the table and the picture of an item; returns what to tell of it."""
    every = runs.find(folder) if folder.is_dir() else []
    table, figure = item.show({e: runs.of(e, every) for e in item.experiments})
    output.mkdir(parents=True, exist_ok=True)
    told = f"# {item.title}\n"
    if item.remark:
        told += f"\n{item.remark}\n"
    if table:
        told += f"\n{table}\n"
    if figure is not None:
        picture = output / f"{name}.png"
        pictures.save(figure, picture)
        told += f"\n![{item.title}]({picture.name})\n"
    if not table and figure is None:
        told += "\nNot one of its runs has come as far as to show something.\n"
    workdir.write_text(output / f"{name}.md", told)
    return told


def main(argv: list[str]) -> None:
    """Makes the runs, then the table or figure."""
    given = flags.FLAGS
    known = items(given.data_dir)
    if len(argv) == 1:
        for name, item in known.items():
            print(f"{name:30} {item.title}")
        return
    if len(argv) > 2:
        raise UserError(f"one at a time: {argv[1]} or {argv[2]}")
    if argv[1] not in known:
        raise UserError(unknown_name("the table or figure", argv[1], tuple(known)))
    name, item = argv[1], known[argv[1]]
    folder = Path(given.workdir)
    if given.budget != "none":
        todo = commands(item, given.budget, given.seeds, folder)
        for number, command in enumerate(todo, 1):
            print(f"# run {number} of {len(todo)}\n{shlex.join(command)}", flush=True)
            if not given.dry_run:
                status = wait_for([sys.executable, *command[1:]])
                if status:
                    sys.exit(status)  # it has said why
    if not given.dry_run:
        output = Path(given.output or folder)
        print(write(name, item, folder, output) + f"\nIn {output}/{name}.md")


if __name__ == "__main__":
    cli.run(main, define_flags)
