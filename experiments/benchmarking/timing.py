"""Times programs against each other, and records the machine."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

import bnlstm_jax
from experiments.records import workdir
from experiments.runtime import checks, memory, progress
from experiments.runtime.errors import UserError

DEVICES = ("cpu", "gpu", "tpu")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "numpy")


class Program(NamedTuple):
    """A program to time.

    Attributes:
      run: runs it to its end.
      memory: bytes that a run needs beside its arguments; None if unknown.
      compile_seconds: time of compilation; None if unknown.
    """

    run: Callable[[], Any]
    memory: int | None = None
    compile_seconds: float | None = None


def measure(
    programs: Mapping[str, Callable[[], Any]], title: str, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each program in each round; each must have run before.

    Programs take turns, so that other work on the machine slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in progress.track(range(rounds), title, rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float], digits: str = ".1f") -> tuple[str, str]:
    """Median, and lowest to highest."""
    low, middle, high = (format(f(values), digits) for f in (min, statistics.median, max))
    return middle, f"{low} to {high}"


# ---- Flags and records of commands.


def use_device(kind: str | None) -> jax.Device:
    """Makes the first device of a kind the default, for measurements; None keeps JAX's choice.

    Call it before JAX starts. The process keeps freed host memory, and JAX does not preallocate GPU
    memory, so that PyTorch can use it.

    Raises:
      UserError: JAX finds no such device.
    """
    memory.keep_freed()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        device = jax.devices(kind)[0]
    except RuntimeError as error:
        if kind is None:
            raise
        raise UserError(
            f"--device={kind}: JAX finds no such device here; install JAX for the device"
        ) from error
    jax.config.update("jax_default_device", device)
    return device


def check_names(flag: str, given: list[str], known: Iterable[str]) -> None:
    """Refuses unknown names, and an empty list.

    Raises:
      UserError: names the flag and the known names.
    """
    if not given:
        raise UserError(f"--{flag} is empty: use one or more of {', '.join(known)}")
    for name in given:
        checks.one_of(f"--{flag}", name, tuple(known))


def circumstances(device: jax.Device) -> dict[str, Any]:
    """The machine, versions, commit, library and date of a measurement."""

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
            "cores": workdir.cores(),
            "processor": processors[0] if processors else None,
        },
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "commit": workdir.current_commit(),
        "library": library_digest(Path(bnlstm_jax.__file__).parent),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def library_digest(folder: Path) -> str:
    """SHA-256 of the sources in a folder, which identifies a version also outside a repository."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()
