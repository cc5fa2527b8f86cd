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

import collections
import contextlib
import functools
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from experiments import cli, metrics, paths, sweeps, workdir
from experiments.errors import Stopped, UserError
from experiments.metrics import rest_of_line, time_left
from experiments.sweeps import Fields, Point
from scripts import sweep_launchers, sweep_table
from scripts.sweep_launchers import Launcher, Slurm

SWEEP_NAME = "sweep.json"
TAIL_BYTES = 10_000  # of a metrics file, more than its last row


def define_flags() -> None:
    """Defines the flags of the command."""
    from experiments import main as run  # which defines flags of a run: a sweep has its own

    for flag in list(flags.FLAGS.flags_by_module_dict()[run.__name__]):
        delattr(flags.FLAGS, flag.name)
    paths.DEFINE_path("sweep", None, "File with the points; see configs/sweeps.", required=True)
    paths.DEFINE_path(
        "workdir", None, "Folder of the sweep; by default runs/sweeps/ and the sweep file's name."
    )
    sweep_launchers.define_flags()


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line, the config's fields as a run does.

    Raises:
      UserError: there is no config.
    """
    from experiments import main as run

    words = run.parse_flags(argv)
    if run.take(argv, "config")[0] is None:
        raise UserError("--config is missing: name the config file whose fields are swept")
    return words


def command_of(point: Point, config_file: str, overrides: Fields) -> list[str]:
    """The command that runs a point."""
    fields = overrides | point.fields
    return [
        sys.executable,
        "-m",
        "experiments.main",
        f"--config={config_file}",
        f"--workdir={point.folder}",
        *(f"--config.{field}={sweeps.argument(value)}" for field, value in fields.items()),
    ]


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
    theirs = workdir.read_json(folder / SWEEP_NAME)
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


def last_update(run: Path) -> int:
    """The update that a run's metrics have come to."""
    try:
        with (run / metrics.FILE_NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"}")]
    return json.loads(whole[-1])["update"] if whole else 0


class Board:
    """Shows how far a sweep is: a progress bar, or a line a minute in a log file."""

    def __init__(self, points: list[Point]) -> None:
        """Finds out how far it was."""
        self._updates = dict.fromkeys((point.name for point in points), 0)
        self._console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._progress = Progress(
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            rest_of_line("left  {task.description}"),
            expand=True,
            transient=True,
            console=self._console,
            speed_estimate_period=metrics.SECONDS_AVERAGED,
            disable=not self._console.is_terminal,
        )
        finished = [point for point in points if point.finished()]
        for point in finished:
            self.look(point)
        self._bar = self._progress.add_task("", completed=sum(self._updates.values()))
        self._logged = time.monotonic()
        self.say(f"{len(points)} points, {len(finished)} of them finished already")

    def __enter__(self) -> "Board":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line)

    def look(self, point: Point) -> None:
        """Sees how far a point is."""
        self._updates[point.name] = sum(map(last_update, point.runs.values()))

    def show(self, points: list[Point], running: int, finished: int, failed: int) -> None:
        """Moves the bar; `points` are those that have not failed."""
        total = sum(point.config.num_updates * len(point.runs) for point in points)
        done = sum(self._updates[point.name] for point in points)
        told = f"{finished} of {len(self._updates)} points finished, {running} running, "
        told += f"{failed} failed, {done:,} of {total:,} updates"
        self._progress.update(self._bar, completed=done, total=total, description=told)
        if not self._console.is_terminal and (
            time.monotonic() - self._logged > metrics.SECONDS_LOGGED
        ):
            (bar,) = self._progress.tasks
            self.say(f"{told}, {time_left(bar.time_remaining)}")
            self._logged = time.monotonic()


class Sweep:
    """The points that are to be run, until each is finished or has failed for good.

    `write` is given the statuses and the errors of points, by name, whenever one has ended. It
    writes, and returns, what the sweep has come to.
    """

    def __init__(
        self,
        points: list[Point],
        commands: dict[str, list[str]],
        launcher: Launcher,
        retries: int,
        write: Callable[[dict[str, str], dict[str, str]], str],
    ) -> None:
        """Takes commands by the names of points."""
        self.points = points
        self.commands = commands
        self.launcher = launcher
        self.retries = retries
        self.write = write
        self.errors: dict[str, str] = {}  # of points that have failed for good
        self._asked: int | None = None  # the signal that asked to stop
        self._wake = threading.Event()

    def run(self) -> str:
        """Runs what is not finished; returns what `write` did last.

        Raises:
          Stopped: a signal asked for it; points that run here have stopped too.
        """
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        earlier = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if earlier[number] != signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, self._ask)
        try:
            with Board(self.points) as board:
                return self._run(board)
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _run(self, board: Board) -> str:
        by_name = {point.name: point for point in self.points}
        # What a sweep that was killed has left running is not started again.
        running = [name for name in by_name if self.launcher.running(name)]
        finished = [n for n, p in by_name.items() if n not in running and p.finished()]
        waiting = collections.deque(n for n in by_name if n not in running and n not in finished)
        if running:
            board.say(f"still running from before: {', '.join(running)}")
        tries = collections.Counter(running)

        def write() -> str:
            statuses = dict.fromkeys(running, "running") | dict.fromkeys(self.errors, "failed")
            return self.write(statuses, self.errors)

        while waiting or running:
            for name in list(running):
                point = by_name[name]
                board.look(point)
                if self.launcher.running(name):
                    continue
                running.remove(name)
                if point.finished():
                    finished.append(name)
                    board.say(f"{name}: finished")
                else:
                    self._failed(name, tries[name], waiting, board)
                write()
            while waiting and len(running) < self.launcher.most and self._asked is None:
                name = waiting.popleft()
                tries[name] += 1
                self.launcher.start(name, self.commands[name])
                running.append(name)
            if self._asked is not None:
                raise self._stop(running, write)
            there = [p for p in self.points if p.name not in self.errors]
            board.show(there, len(running), len(finished), len(self.errors))
            if waiting or running:
                self._wake.wait(self.launcher.interval)
        return write()

    def _failed(self, name: str, tries: int, waiting: collections.deque, board: Board) -> None:
        """Queues a point again, or gives it up."""
        problem = f"{self.launcher.error(name)} ({self.launcher.log(name)})"
        if tries <= self.retries:
            waiting.append(name)
            board.say(f"{name}: failed, and is tried again: {problem}")
        else:
            self.errors[name] = problem
            board.say(f"{name}: failed: {problem}")

    def _ask(self, number: int, _: Any) -> None:
        if self._asked is not None:
            raise KeyboardInterrupt
        self._asked = number
        self._wake.set()

    def _stop(self, running: list[str], write: Any) -> Stopped:
        """Stops points that run here; returns what to raise."""
        with contextlib.suppress(OSError):  # who read it may have got the same Ctrl-C
            os.write(sys.stderr.fileno(), b"stopping; once more leaves points to themselves\n")
        told = self.launcher.stop(list(running))
        running[:] = [name for name in running if self.launcher.running(name)]
        write()
        return Stopped(f"stopped: {told}; the same command goes on", self._asked)

    def exit_if_failed(self) -> None:
        """Ends the program with status 1 if a point has failed."""
        if self.errors:
            told = f"error: {len(self.errors)} of {len(self.points)} points failed"
            print(told, file=sys.stderr)
            sys.exit(1)


def show(points: list[Point], commands: dict[str, list[str]], launcher: Launcher) -> None:
    """Prints what would be run."""
    for point in points:
        if point.finished():
            print(f"# {point.name}: finished\n")
            continue
        print(f"# {point.name}\n{shlex.join(commands[point.name])}\n")
        if isinstance(launcher, Slurm):
            print(f"{launcher.script(point.name)}\n")


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
    commands = {p.name: command_of(p, config_file, overrides) for p in points}
    launcher = sweep_launchers.make_launcher(given, folder)
    if given.dry_run:
        show(points, commands, launcher)
        return
    launcher.check()
    with workdir.in_use(folder):
        workdir.write_json(folder / SWEEP_NAME, described)
        write = functools.partial(sweep_table.write, points, folder=folder)
        sweep = Sweep(points, commands, launcher, given.retries, write)
        table = sweep.run()
    print(f"\n{table}\nOf each run: {folder / sweep_table.CSV_NAME}")
    sweep.exit_if_failed()


if __name__ == "__main__":
    cli.run(main, define_flags, parse_flags)
