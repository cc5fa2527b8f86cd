"""Runs the points of a sweep until each has finished or failed."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.launching import sweeps
from experiments.launching.launchers import Launcher
from experiments.launching.sweeps import Fields, Point
from experiments.records import workdir
from experiments.runtime.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: a terminal was closed


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


def show(points: list[Point], commands: dict[str, list[str]], launcher: Launcher) -> None:
    """Prints what would be run."""
    for point in points:
        if point.finished():
            print(f"# {point.name}: finished\n")
        else:
            print(f"# {point.name}\n{launcher.describe(point, commands[point.name])}\n")


def run(
    points: list[Point],
    commands: dict[str, list[str]],
    launcher: Launcher,
    write: Callable[[dict[str, str]], Any],
) -> dict[str, str]:
    """Runs the points that have not finished.

    Args:
      points: all points.
      commands: their commands, by name.
      launcher: starts commands.
      write: called with the errors so far, by name, whenever a point has ended.

    Returns:
      The errors of the points that failed, by name.

    Raises:
      Stopped: a signal came; points that ran here have saved and ended.
      UserError: the launcher's folder is in use, or SLURM refuses a job.
    """
    with workdir.in_use(launcher.folder):
        try:
            with Signals() as signals:
                return _run(points, commands, launcher, write, signals)
        except BaseException:
            launcher.stop()
            raise


def _run(
    points: list[Point],
    commands: dict[str, list[str]],
    launcher: Launcher,
    write: Callable[[dict[str, str]], Any],
    signals: "Signals",
) -> dict[str, str]:
    errors: dict[str, str] = {}
    waiting, running = [], []
    for point in points:
        if not point.finished():
            (running if launcher.find(point) else waiting).append(point)
    finished = len(points) - len(waiting) - len(running)
    _say(f"{len(points)} points: {finished} finished, {len(running)} running")
    while waiting or running:
        while waiting and len(running) < launcher.at_once:
            signals.check()
            point = waiting.pop(0)
            launcher.start(point, commands[point.name])
            running.append(point)
            _say(f"{point.name}: started, log: {launcher.log(point)}")
        ended = [point for point in running if not launcher.running(point)]
        running = [point for point in running if point not in ended]
        for point in ended:
            if point.finished():
                finished += 1
                _say(f"{point.name}: finished, {finished} of {len(points)}")
            else:
                log = launcher.log(point)
                errors[point.name] = f"{_last_error(log) or launcher.ending(point)} ({log})"
                _say(f"{point.name}: failed: {errors[point.name]}")
            write(errors)
        if not ended:
            signals.sleep(launcher.interval)
    return errors


def _say(line: str) -> None:
    print(line, flush=True)


def _last_error(log: Path) -> str:
    """The last error in a log, in one line; empty if there is none."""
    if not log.exists():
        return "no log: the job did not start"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    if not errors and any(line.startswith("Traceback ") for line in lines):
        errors = list(filter(None, lines))  # the exception comes last
    return errors[-1] if errors else ""


class Signals:
    """Signals that stop a sweep, but not while it starts a point, which would then be lost."""

    def __init__(self) -> None:
        """None has arrived yet."""
        self._received: int | None = None
        self._waiting = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        """Installs the handlers, except for ignored signals, such as SIGHUP under nohup."""
        for number in SIGNALS:
            earlier = signal.getsignal(number)
            if earlier != signal.SIG_IGN:
                self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the earlier handlers."""
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)

    def check(self) -> None:
        """Raises `Stopped` if a signal has arrived."""
        if self._received is not None:
            raise Stopped("stopped; run the same command to continue", self._received)

    def sleep(self, seconds: float) -> None:
        """Waits; raises `Stopped` at a signal."""
        self._waiting = True
        self.check()
        time.sleep(seconds)
        self._waiting = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._received = number
        if self._waiting:
            self.check()
