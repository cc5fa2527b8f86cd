"""Checkpoints of a run: the latest, to go on from, and the best, to evaluate. Through Orbax.

A checkpoint holds plain arrays, nothing of the devices they were on, and a SHA-256 over them. The
first process alone writes and reads; the others are sent what it read.
"""

import contextlib
import errno
import hashlib
import json
import logging as stdlib_logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from experiments.records import workdir
from experiments.runtime import processes
from experiments.runtime.errors import Stopped, UserError

LATEST_KEPT = 2  # the last one may turn out to be damaged

# Orbax would wait for the other processes.
_ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
)


def _told(record: stdlib_logging.LogRecord) -> bool:
    # Orbax remarks upon each checkpoint that is not validated, and upon folders that are only read.
    # What it cannot write becomes an error of ours.
    meant = ("Requested `tracked_metric`", "read_only=True", "directory is read only")
    remark = any(words in record.getMessage() for words in meant)
    return not ("orbax" in record.pathname and (remark or record.exc_info))


logging.get_absl_logger().addFilter(_told)


class Damaged(Exception):
    """A checkpoint is not what was saved, or is not whole."""


class Checkpoints:
    """The folder `checkpoints` of a workdir, which keeps the latest two and the best.

    Saving goes on in the background; leaving the `with` block waits for it.
    """

    def __init__(
        self, folder: Path, selection: str, lower_is_better: bool, read_only: bool = False
    ) -> None:
        """The best is the one with the lowest, or highest, metric `selection`; the later of two.

        Unless `read_only`, damaged checkpoints are put aside, with a warning.

        Raises:
          UserError: the folder cannot be written, or all its checkpoints are damaged.
        """
        self._folder = folder.absolute() / "checkpoints"
        self._selection = selection
        self._manager = None
        if not processes.is_first():
            processes.on_first(lambda: None)
            return

        def selected(metrics: dict[str, float]) -> float:
            return metrics[selection]

        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(LATEST_KEPT),
                preservation_policy.BestN(
                    get_metric_fn=selected,
                    reverse=lower_is_better,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            create=False,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of saves that were cut short
            best_fn=selected,
            best_mode="min" if lower_is_better else "max",
            preservation_policy=policy,
            multiprocessing_options=_ALONE,
        )

        def open_folder() -> None:
            try:
                if not read_only:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    put_aside_damaged(self._folder)
                self._manager = ocp.CheckpointManager(self._folder, options=options)
            except OSError as error:
                raise UserError(
                    f"--workdir={folder} cannot be written: {error.strerror}"
                ) from error

        processes.on_first(open_folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self._manager is None:
            return
        # Where something went wrong before, that is what is told.
        well = kind is None or issubclass(kind, Stopped)
        with self._written() if well else contextlib.suppress(OSError, ValueError):
            self._manager.close()

    def save(self, state: TrainState, validation: dict[str, float] | None) -> None:
        """Saves `state` at its step; finite `validation` makes it a candidate for the best.

        Raises:
          UserError: this checkpoint, or the one before it, cannot be written.
        """
        if self._manager is None:
            return
        step = int(state.step)
        if validation and not math.isfinite(validation[self._selection]):
            validation = None
        # Copies: the next update reuses the memory of the state.
        arrays = jax.tree.map(np.array, jax.device_get(serialization.to_state_dict(state)))
        seal = {"sha256": digest(step, arrays, validation), "metrics": validation}
        content = ocp.args.StandardSave(arrays)
        with self._written():
            self._manager.save(step, args=content, metrics=validation, custom_metadata=seal)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Tells of what could not be written, now or in the background before."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            if "No space left" in reason or "RESOURCE_EXHAUSTED" in reason:
                reason = "no space left on device"
            raise UserError(
                f"a checkpoint cannot be written to {self._folder} ({reason[:200]}); those before "
                "it are there still: make room, and start the run again"
            ) from error

    def latest_step(self) -> int | None:
        """The update of the latest checkpoint, if there is any."""
        return processes.on_first(lambda: self._manager.latest_step())

    def best_step(self) -> int | None:
        """The update of the best checkpoint, if one has been validated."""

        def best_step() -> int | None:
            with self._written():
                self._manager.wait_until_finished()
            return self._manager.best_step()

        return processes.on_first(best_step)

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The checkpoint of an update, in the form of `state`; arrays are in the host's memory.

        Raises:
          UserError: it is damaged, or is of another model.
        """
        state = jax.device_get(state)

        def read() -> None:
            nonlocal state
            with self._written():
                self._manager.wait_until_finished()
            try:
                arrays, _ = read_checkpoint(self._folder, step)
            except Damaged as damage:
                raise UserError(f"{damage}; start the run again, to go on from another") from damage
            # A metric that the run did not have then has nothing to be averaged with.
            arrays["window"] = serialization.to_state_dict(state.window) | arrays["window"]
            saved = flatten_dict(arrays, sep="/")
            wanted = flatten_dict(serialization.to_state_dict(state), sep="/")
            for name in sorted(saved.keys() | wanted.keys()):
                if np.shape(saved.get(name)) != np.shape(wanted.get(name)):
                    raise UserError(
                        f"{self._folder / str(step)} is of another model: {name} is "
                        f"{np.shape(saved.get(name))} there, and here {np.shape(wanted.get(name))}"
                    )
            state = serialization.from_state_dict(state, arrays)

        processes.on_first(read)
        return processes.from_first(state)


def digest(step: int, arrays: Any, metrics: dict[str, float] | None) -> str:
    """SHA-256 over a checkpoint: its update, the arrays by name, and the metrics."""
    total = hashlib.sha256(json.dumps([step, metrics], sort_keys=True).encode())
    for name, array in sorted(flatten_dict(arrays, sep="/").items()):
        array = np.asarray(array, order="C")
        total.update(f"{name} {array.dtype.str} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def read_checkpoint(folder: Path, step: int) -> tuple[Any, dict[str, float] | None]:
    """The arrays and the metrics of a checkpoint, verified.

    Raises:
      Damaged: they are not what was saved.
      UserError: they cannot be read now, whatever they are.
    """
    workdir.check_path(folder)
    path = folder / str(step)
    try:
        seal = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        reader = ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=_ALONE),
            multiprocessing_options=_ALONE,
        )
        with reader:
            arrays = reader.restore(path / "default", args=ocp.args.StandardRestore())
        metrics = None
        if (path / "metrics").exists():
            metrics = json.loads((path / "metrics" / "metrics").read_text())
        if digest(step, arrays, metrics) == seal["sha256"]:
            return arrays, metrics
        reason = "its checksum is another"
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise many kinds for files that make no sense
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ENOTDIR):
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        logging.debug("%s", error)
        reason = f"it cannot be read ({type(error).__name__})"
    raise Damaged(f"the checkpoint {path} is damaged: {reason}")


def steps_in(folder: Path) -> list[int]:
    """The updates of the checkpoints in a folder, the latest first."""
    return sorted(
        (int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True
    )


def put_aside_damaged(folder: Path) -> None:
    """Renames the damaged checkpoints of a folder to `STEP.damaged`, with a warning for each.

    Raises:
      UserError: there is none but damaged ones. They stay as they are.
    """
    damages = {}
    for step in (steps := steps_in(folder)):
        try:
            read_checkpoint(folder, step)
        except Damaged as damage:
            damages[step] = damage
    if damages and len(damages) == len(steps):
        raise UserError(
            f"{next(iter(damages.values()))}, and there is no other: start the run from its "
            "beginning in another folder (--workdir)"
        )
    for step, damage in damages.items():
        aside = folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / str(step)).rename(aside)
        logging.warning("%s; it is now %s, and another is used", damage, aside)


def read_best(folder: Path) -> tuple[int, dict[str, Any], str]:
    """The best checkpoint so far of the run in `folder`, which may still be going on.

    Returns:
      Its update; the model's variables, with re-estimated population statistics where they have
      been saved; and which statistics there are: `population`, `running`, or `none`.

    Raises:
      UserError: there is no run, or no checkpoint that has been validated, or it is damaged.
    """
    record = workdir.read_record(folder)
    if "selection" not in record:
        raise UserError(
            f"{folder / 'run.json'} is of an earlier version: start the run again, to complete it"
        )
    update, variables = _read_best(folder, record["selection"], record["lower_is_better"])
    if "batch_stats" not in variables:
        return update, variables, "none"
    population = workdir.read_statistics(folder, update)
    if population is None:
        return update, variables, "running"
    return update, {**variables, "batch_stats": population}, "population"


def _read_best(folder: Path, selection: str, lower_is_better: bool) -> tuple[int, dict[str, Any]]:
    for last_try in (False, False, True):
        if not (folder / "checkpoints").is_dir():
            break
        with Checkpoints(folder, selection, lower_is_better, read_only=True) as checkpoints:
            update = checkpoints.best_step()
        if update is None:
            break
        try:
            arrays, _ = read_checkpoint(folder.absolute() / "checkpoints", update)
        except Damaged as damage:  # or deleted in this moment by the run, which has a better one
            if last_try:
                raise UserError(str(damage)) from damage
            time.sleep(0.5)
            continue
        kept = ("params", "batch_stats")
        return update, {name: arrays[name] for name in kept if arrays.get(name)}
    raise UserError(f"--workdir={folder} holds no validated checkpoint yet")
