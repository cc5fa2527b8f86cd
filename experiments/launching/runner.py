"""Runs the points of a sweep until each is finished or has failed for good."""

import collections
import contextlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from experiments.launching import sweeps
from experiments.launching.launchers import Launcher, Slurm
from experiments.launching.sweeps import Fields, Point
from experiments.records import metrics
from experiments.runtime import progress
from experiments.runtime.errors import Stopped
from experiments.runtime.progress import rest_of_line, time_left

TAIL_BYTES = 10_000  # of a metrics file, more than its last row


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
            speed_estimate_period=progress.SECONDS_AVERAGED,
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
            time.monotonic() - self._logged > progress.SECONDS_LOGGED
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
