"""How benchmarks time programs against each other, and what they write with the times."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.records import workdir
from experiments.runtime import errors, progress
from experiments.runtime.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "torch", "numpy")


class Program(NamedTuple):
    """What can be run over and over, and what is known of it; None is unknown."""

    run: Callable[[], None]
    memory: int | None = None  # bytes that a run needs beside its arguments
    compile_seconds: float | None = None


def measure(
    programs: dict[str, Callable[[], None]], title: str, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each program in each round; each runs once before, unmeasured.

    They take turns, so that what else the machine does falls on all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program()  # compiles
    for _ in progress.track(range(rounds), title, rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float], unit: float = 1e-3) -> tuple[str, str]:
    """Median, and lowest and highest, in units of so many seconds: milliseconds by default."""
    low, middle, high = (f(seconds) / unit for f in (min, statistics.median, max))
    return f"{middle:.1f}", f"{low:.1f} to {high:.1f}"


def check_names(flag: str, given: list[str], known: Iterable[str]) -> None:
    """Refuses names that are not among those known, and none at all."""
    if not given:
        raise UserError(f"--{flag} is empty: there are {', '.join(known)}")
    for name in given:
        if name not in known:
            raise UserError(errors.unknown_name(f"--{flag}", name, known))


def check_output(path: Path) -> None:
    """Refuses a file that cannot be written."""
    if path.is_dir():
        raise UserError(f"--output={path} cannot be written: it is a folder")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--output={path} cannot be written: {error.strerror}") from error


def circumstances(device: jax.Device) -> dict[str, Any]:
    """On what, with what and when all is measured."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processors = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": {
            "device": device.device_kind,
            "platform": device.platform,
            "cores": os.cpu_count(),
            "processor": processors[0] if processors else None,
        },
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "commit": workdir.current_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
