"""Runs the points of a sweep until each has finished or failed."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
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
            with _signals_raise():
                return _run(points, commands, launcher, write)
        except BaseException:
            launcher.stop()
            raise


def _run(
    points: list[Point],
    commands: dict[str, list[str]],
    launcher: Launcher,
    write: Callable[[dict[str, str]], Any],
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
                errors[point.name] = f"{_last_error(log)} ({log})"
                _say(f"{point.name}: failed: {errors[point.name]}")
            write(errors)
        if not ended:
            time.sleep(launcher.interval)
    return errors


def _say(line: str) -> None:
    print(line, flush=True)


def _last_error(log: Path) -> str:
    """The last error in a log, in one line."""
    if not log.exists():
        return "no log: the job did not start"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("error: ")] or list(filter(None, lines))
    return errors[-1] if errors else "ended without an error message"


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Makes signals raise `Stopped`, unless they are ignored, as SIGHUP under nohup."""
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in earlier.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped("stopped; the same command goes on", number)
