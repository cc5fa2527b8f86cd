"""The folder of a run: its config, the record of how it was made, and its lock."""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from experiments.config import base_config, check_fields, model_kinds
from experiments.runtime.errors import UserError
from experiments.runtime.files import lock, read_json, replacing, write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections", "numpy")
POPULATION_FIELDS = ("population_batch_size", "population_batches", "population_late_steps")
EVALUATION_FIELDS = (
    "eval_batch_size",
    "eval_lengths",
    "whole_text",
    "chunk_length",
    *POPULATION_FIELDS,
)
# A run may continue with other values of these fields: places of data and curves, number of
# updates, evaluation, and choices that change results only by rounding. With noise or dropout,
# another number of devices also changes the random draws.
FREE_FIELDS = (
    "data_dir",
    "text_file",
    "wandb",
    "num_updates",
    "updates_per_call",
    "model.implementation",
    "parallel.devices",
    *EVALUATION_FIELDS,
)
STATISTICS_NAME = "population_statistics.npz"
# Errors of open files, which carry no file name.
OF_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      UserError: the folder holds no run, or only runs in subfolders; or the config is damaged or of
        another version.
    """
    path = workdir / "config.json"
    if not path.exists():
        others = runs_around(workdir)
        problem = f"choose {' or '.join(map(str, others))}" if others else f"{path} is missing"
        raise UserError(f"--workdir={workdir} is not the folder of a run: {problem}")
    config = ConfigDict({"wandb": "", **_tuples(read_json(path))})  # early runs lack `wandb`
    try:
        check_fields(config, base_config())
    except UserError as error:
        raise UserError(f"{path} is damaged, or of another version: {error}") from error
    return config


def of_kinds(config: ConfigDict, folder: Path) -> dict[str, tuple[ConfigDict, Path]]:
    """Config and workdir of the run of each kind of model that a config names.

    The workdir is `folder`; for several kinds, each has its own subfolder.
    """
    kinds = model_kinds(config)
    runs = {}
    for kind in kinds:
        own = config.copy_and_resolve_references()
        own.model.kind = kind
        runs[kind] = own, folder / kind if len(kinds) > 1 else folder
    return runs


def runs_around(workdir: Path) -> list[Path]:
    """The workdirs directly in a folder, and its parent folder if that is a workdir."""
    configs = [*sorted(workdir.glob("*/config.json")), workdir.parent / "config.json"]
    return [path.parent for path in configs if path.exists()]


def read_record(workdir: Path) -> dict[str, Any]:
    """The content of `run.json` of the run in `workdir`: the facts of its task, and its `starts`.

    Raises:
      UserError: there is no run.
    """
    path = workdir / "run.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} is not the folder of a run: {path} is missing")
    return read_json(path)


def check_record(record: dict[str, Any], workdir: Path) -> None:
    """Refuses to continue a run on other data, or with batch statistics over more or fewer rows.

    The data set's name and the padding of batches may differ.

    Raises:
      UserError: the record of the run in `workdir` differs.
    """
    if not (workdir / "run.json").exists():
        return
    theirs = read_record(workdir)
    ours = json.loads(json.dumps(record))
    for name, value in ours.items():
        if theirs.get(name) == value or name in ("dataset", "padded_lengths"):
            continue
        if name == "statistics_rows" and name not in theirs:  # of an earlier version
            continue
        run, restore = "a run on other data", "the data of that run"
        if name == "statistics_rows":
            run, restore = "a run with other batch statistics", "the number of devices"
        raise UserError(
            f"--workdir={workdir} holds {run}: {name} is {_short(theirs.get(name))} in that run, "
            f"{_short(value)} now; choose another workdir, or restore {restore}"
        )


def write_statistics(workdir: Path, step: int, batch_stats: dict[str, Any]) -> None:
    """Saves the re-estimated population statistics of the checkpoint of update `step`.

    The `.npz` file has arrays such as `layer/recurrent_mean`, each `[max_steps, F]` or `[F]`.
    """
    with replacing(workdir / STATISTICS_NAME) as temporary, temporary.open("wb") as file:
        np.savez(file, update=step, **flatten_dict(batch_stats, sep="/"))


def read_statistics(workdir: Path, step: int) -> dict[str, Any] | None:
    """The population statistics of a checkpoint as a collection; None if they were not saved.

    Raises:
      UserError: the file cannot be read.
    """
    path = workdir / STATISTICS_NAME
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            arrays = dict(file)
        if arrays.pop("update") != step:
            return None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged: delete it, and run "
            f"python -m experiments.main --mode=evaluate --workdir={workdir}"
        ) from error
    return unflatten_dict(arrays, sep="/")


def check_path(workdir: Path) -> None:
    """Refuses a folder whose checkpoints could be written but not read.

    Raises:
      UserError: its path has a character that TensorStore, which Orbax uses, takes for a pattern.
    """
    path = str(workdir.absolute())
    for character in "[]\\":
        if character in path:
            raise UserError(
                f"--workdir: checkpoints cannot be read from a path with {character!r}, got "
                f"{path}; choose another folder, or rename it"
            )


def check(config: ConfigDict, workdir: Path) -> None:
    """Refuses a folder that cannot be, or must not be, the workdir of this config's run.

    Raises:
      UserError: it holds the run of another config, or folders of runs; it lies in the folder of a
        run; it is not a folder; or its path cannot hold checkpoints.
    """
    check_path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is not a folder")
    if not (workdir / "config.json").exists():
        if others := runs_around(workdir):
            raise UserError(
                f"--workdir={workdir}: runs cannot be nested, and there are runs in "
                f"{', '.join(map(str, others))}; choose another workdir, or one of these"
            )
        return
    ours, theirs = flat(config), flat(read_config(workdir))
    differing = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name) and name not in FREE_FIELDS
    )
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more fields)" if len(differing) > 1 else ""
        raise UserError(
            f"--workdir={workdir} holds the run of another config: config.{name} is "
            f"{theirs.get(name)} in that run, {ours.get(name)} now{more}; choose another workdir"
        )


def check_task(config: ConfigDict, workdir: Path, task: str) -> None:
    """Refuses the run of another task than `task`, for commands that serve one.

    Raises:
      UserError: names both tasks.
    """
    if config.task != task:
        raise UserError(
            f"--workdir={workdir} holds a run of the task {config.task}: it must be of the task "
            f"{task}"
        )


def check_exists(config: ConfigDict, workdir: Path) -> None:
    """Refuses a folder that does not hold a run of this config.

    Raises:
      UserError: as `read_config` and `check`.
    """
    read_config(workdir)
    check(config, workdir)


@contextlib.contextmanager
def in_use(workdir: Path) -> Iterator[None]:
    """Makes the folder and locks it for this process, within a context.

    Raises:
      UserError: another process has locked it; or, at any time, a file in it cannot be written.
    """
    with errors_told(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "lock").open("a+") as file:
            if not lock(file):
                file.seek(0)
                raise UserError(
                    f"--workdir={workdir} is in use by {file.read().strip() or 'another run'}: "
                    "wait for it to end, or choose another workdir; if that machine is gone, "
                    f"delete {file.name}"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield


@contextlib.contextmanager
def errors_told(workdir: Path) -> Iterator[None]:
    """Turns errors of the file system into a `UserError` of one line.

    Raises:
      UserError: a file cannot be read or written, in `workdir` or elsewhere.
    """
    try:
        yield
    except BrokenPipeError:  # from stdout
        raise
    except OSError as error:
        if error.filename is None and error.errno not in OF_FILES:
            raise
        place = Path(error.filename or workdir)
        if not place.is_relative_to(workdir):
            raise UserError(f"{place}: {error.strerror}") from error
        inside = f" ({place})" if place != workdir else ""
        raise UserError(
            f"--workdir={workdir} cannot be read or written: {error.strerror}{inside}"
        ) from error


def open_workdir(
    config: ConfigDict, workdir: Path, record: dict[str, Any], implementation: str
) -> None:
    """Saves the config, and command, versions, machine and time of this start.

    Call `check` before, and this within `in_use`. `run.json` has the `record` and an entry for each
    start of the run. `implementation` is the implementation of the recurrence.
    """
    start = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
        "machine": f"{platform.machine()}, {cores()} cores",
        "implementation": implementation,
    }
    path = workdir / "run.json"
    earlier = read_json(path).get("starts", []) if path.exists() else []
    write_json(path, {"starts": [*earlier, start], **record})
    write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))


def cores() -> int | None:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def record_end(workdir: Path, update: int) -> None:
    """Adds the last update and the seconds to the latest start in `run.json`.

    A start that was killed has neither.
    """
    record = read_json(workdir / "run.json")
    latest = record["starts"][-1]
    taken = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(latest["started"])
    latest |= {"until": update, "seconds": round(taken.total_seconds())}
    write_json(workdir / "run.json", record)


def flat(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config by their full names, with JSON's types."""
    return flatten_dict(json.loads(config.to_json_best_effort()), sep=".")


def _tuples(value: Any) -> Any:
    """Converts JSON's lists to tuples, as in config fields."""
    if isinstance(value, dict):
        return {name: _tuples(field) for name, field in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _short(value: Any) -> str:
    """A value as text that fits in a message of one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}... ({len(value)} in all)"


def current_commit() -> str | None:
    """The commit of the code, with a + if files differ from it; None outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Takes no lock, so that a commit can be made at the same time.
        dirty = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
