"""Checkpoints of a run, by Orbax: the latest, to continue from, and the best, to evaluate.

A checkpoint holds plain arrays, without their devices, and a SHA-256 over them, which Orbax lacks.
Only the first process writes and reads checkpoints; it sends their content to the others.
"""

import contextlib
import errno
import hashlib
import json
import logging as stdlib_logging
import math
import os
import re
import shutil
import sys
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
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from experiments.records import metrics, results_file, workdir
from experiments.runtime import processes
from experiments.runtime.errors import Stopped, UserError

LATEST_KEPT = 2  # the last one may turn out to be damaged

# Otherwise Orbax waits for the other processes.
_ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
)


def _is_needed(record: stdlib_logging.LogRecord) -> bool:
    # Drops Orbax's warnings about checkpoints without metrics and about read-only folders, and its
    # tracebacks: a failed write becomes a UserError.
    remarks = ("Requested `tracked_metric`", "read_only=True", "directory is read only")
    remark = any(words in record.getMessage() for words in remarks)
    return "orbax" not in record.pathname or not (remark or record.exc_info)


logging.get_absl_logger().addFilter(_is_needed)


class Damaged(Exception):
    """A checkpoint is incomplete, or differs from what was saved."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """False: the training loop polls JAX itself; polls by Orbax would mix up its numbers."""
        return False


class Checkpoints:
    """The folder `checkpoints` of a workdir, which keeps the latest two and the best.

    Saving continues in the background; leaving the `with` block waits for it.
    """

    def __init__(
        self, folder: Path, selection: str, lower_is_better: bool, read_only: bool = False
    ) -> None:
        """The best has the lowest or highest metric `selection`; of two equal ones, the later.

        Unless `read_only`, damaged checkpoints are renamed, with a warning.

        Raises:
          UserError: the folder cannot be written, or all its checkpoints are damaged.
        """
        self._folder = folder.absolute() / "checkpoints"
        self._selection = selection
        self._lower_is_better = lower_is_better
        self._manager = None
        processes.on_first(lambda: self._open(folder, read_only))

    def _open(self, workdir: Path, read_only: bool) -> None:
        def selected(metrics: dict[str, float]) -> float:
            return metrics[self._selection]

        best = preservation_policy.BestN(
            get_metric_fn=selected,
            reverse=self._lower_is_better,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        latest = preservation_policy.LatestN(LATEST_KEPT)
        options = ocp.CheckpointManagerOptions(
            create=False,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # left by interrupted saves
            best_fn=selected,
            best_mode="min" if self._lower_is_better else "max",
            preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
            multiprocessing_options=_ALONE,
        )
        try:
            if not read_only:
                self._folder.mkdir(parents=True, exist_ok=True)
                put_aside_damaged(self._folder)
            self._manager = _Manager(self._folder, options=options)
        except OSError as error:
            use = "read" if read_only else "written"
            raise UserError(f"--workdir={workdir} cannot be {use}: {error.strerror}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self._manager is None:
            return
        # After another error, a failed write is not reported.
        sound = kind is None or issubclass(kind, Stopped)
        with self._written() if sound else contextlib.suppress(OSError, ValueError):
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
        seal = {"sha256": digest(step, arrays, validation)}
        content = ocp.args.StandardSave(arrays)
        with self._written():
            self._manager.save(step, args=content, metrics=validation, custom_metadata=seal)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Turns errors of writing, now or earlier in the background, into a `UserError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            if "No space left" in reason or "RESOURCE_EXHAUSTED" in reason:
                reason = "no space left on device"
            raise UserError(
                f"a checkpoint cannot be written to {self._folder} ({reason[:200]}): remove the "
                "cause, and run the same command again; earlier checkpoints are kept"
            ) from error

    def latest_step(self) -> int | None:
        """The update of the latest checkpoint, None if there is none."""
        return processes.on_first(lambda: self._manager.latest_step())

    def best_step(self) -> int | None:
        """The update of the best checkpoint, None if none has been validated."""

        def best_step() -> int | None:
            with self._written():
                self._manager.wait_until_finished()
            return self._manager.best_step()

        return processes.on_first(best_step)

    def has_put_aside(self, step: int) -> bool:
        """Whether the checkpoint of an update was damaged, renamed, and not made again."""
        return (self._folder / f"{step}.damaged").exists() and step not in steps_in(self._folder)

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The checkpoint of an update, in the structure of `state`, with arrays on the host.

        Raises:
          UserError: it is damaged, or is of another model.
        """
        state = jax.device_get(state)

        def read() -> None:
            nonlocal state
            with self._written():
                self._manager.wait_until_finished()
            try:
                arrays = read_checkpoint(self._folder, step)
            except Damaged as damage:
                raise UserError(
                    f"{damage}; run the training command again, to use another checkpoint"
                ) from damage
            # Early runs lack `gradient_norm`.
            arrays["window"] = serialization.to_state_dict(state.window) | arrays["window"]
            saved = flatten_dict(arrays, sep="/")
            wanted = flatten_dict(serialization.to_state_dict(state), sep="/")
            for name in sorted(saved.keys() | wanted.keys()):
                if np.shape(saved.get(name)) != np.shape(wanted.get(name)):
                    raise UserError(
                        f"{self._folder / str(step)} is of another model: {name} has the shape "
                        f"{np.shape(saved.get(name))}, expected {np.shape(wanted.get(name))}"
                    )
            state = serialization.from_state_dict(state, arrays)

        processes.on_first(read)
        return processes.from_first(state)


def digest(step: int, arrays: Any, metrics: dict[str, float] | None) -> str:
    """SHA-256 over a checkpoint: its update, arrays by name, and metrics."""
    total = hashlib.sha256(json.dumps([step, metrics], sort_keys=True).encode())
    for name, array in sorted(flatten_dict(arrays, sep="/").items()):
        array = np.asarray(array, order="C")
        total.update(f"{name} {array.dtype.str} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def read_checkpoint(folder: Path, step: int) -> Any:
    """The arrays of a checkpoint, verified.

    Raises:
      Damaged: they differ from what was saved.
      UserError: they cannot be read at the moment.
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
            return arrays
        reason = "its checksum differs"
    except MemoryError:
        raise
    except Exception as error:  # libraries raise many kinds for damaged files
        # TensorStore, which reads arrays, gives the system's error only in its message.
        told = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number not in (None, errno.ENOENT, errno.ENOTDIR):
            raise UserError(f"{path} cannot be read: {os.strerror(number)}") from error
        logging.debug("%s", error)
        reason = f"it cannot be read ({type(error).__name__})"
    raise Damaged(f"the checkpoint {path} is damaged: {reason}")


def steps_in(folder: Path) -> list[int]:
    """The updates of the checkpoints in a folder, the latest first."""
    return sorted(
        (int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True
    )


def check_not_lost(config: ConfigDict, workdir: Path) -> None:
    """Refuses a run whose checkpoints are gone: a new start would delete its metrics.

    Raises:
      UserError: says how far the run has come.
    """
    folder = workdir / "checkpoints"
    if folder.is_dir() and steps_in(folder):
        return
    rows = metrics.read_metrics(workdir)
    last = rows[-1]["update"] if rows else 0
    # A run that is killed may lack its first checkpoint, but only until it saves the second.
    if results_file.read(workdir) or last > 2 * min(config.eval_every, config.checkpoint_every):
        raise UserError(
            f"--workdir={workdir} holds metrics up to update {last:,}, but no checkpoint: restore "
            "its folder checkpoints, or choose another workdir"
        )


def put_aside_damaged(folder: Path) -> None:
    """Renames the damaged checkpoints of a folder to `STEP.damaged`, with a warning for each.

    Raises:
      UserError: all are damaged. They stay as they are.
    """
    damages = {}
    for step in (steps := steps_in(folder)):
        try:
            read_checkpoint(folder, step)
        except Damaged as damage:
            damages[step] = damage
    if damages and len(damages) == len(steps):
        raise UserError(
            f"{next(iter(damages.values()))}, and no other is intact: start a new run in another "
            "--workdir"
        )
    for step, damage in damages.items():
        aside = folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / str(step)).rename(aside)
        logging.warning("%s; it was renamed to %s, and another one is used", damage, aside)


def read_best(folder: Path) -> tuple[int, dict[str, Any], str]:
    """The best checkpoint so far of the run in `folder`, which may still be in progress.

    Returns:
      Its update; the model's variables, with re-estimated population statistics if they have been
      saved; and which statistics these are: `population`, `running`, or `none`.

    Raises:
      UserError: there is no run, no validated checkpoint, or the checkpoint is damaged.
    """
    record = workdir.read_record(folder)
    missing = UserError(f"--workdir={folder} holds no validated checkpoint yet: train further")
    if not (folder / "checkpoints").is_dir():
        raise missing
    update, variables = _read_best(folder, record["selection"], record["lower_is_better"])
    if update is None:
        raise missing
    if "batch_stats" not in variables:
        return update, variables, "none"
    population = workdir.read_statistics(folder, update)
    if population is None:
        return update, variables, "running"
    return update, {**variables, "batch_stats": population}, "population"


def tell_statistics(folder: Path, update: int, statistics: str) -> None:
    """Notes on stderr that a model has only running averages; arguments as from `read_best`."""
    if statistics == "running":
        print(
            f"no re-estimated population statistics of update {update} yet: using running averages"
            f"; to re-estimate: python -m experiments.main --mode=evaluate --workdir={folder}",
            file=sys.stderr,
        )


def _read_best(
    folder: Path, selection: str, lower_is_better: bool, tries: int = 3
) -> tuple[int | None, dict[str, Any]]:
    with Checkpoints(folder, selection, lower_is_better, read_only=True) as checkpoints:
        update = checkpoints.best_step()
    if update is None:
        return None, {}
    try:
        arrays = read_checkpoint(folder.absolute() / "checkpoints", update)
    except Damaged as damage:  # or the run has just deleted it for a better one
        if tries == 1:
            raise UserError(str(damage)) from damage
        time.sleep(0.5)
        return _read_best(folder, selection, lower_is_better, tries - 1)
    return update, {name: arrays[name] for name in ("params", "batch_stats") if arrays.get(name)}
