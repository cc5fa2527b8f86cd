"""Checkpoints of a run: the latest, to go on from, and the best, to evaluate. Through Orbax."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from flax.training.train_state import TrainState
from orbax.checkpoint.checkpoint_managers import preservation_policy

from experiments import workdir
from experiments.errors import UserError


class Checkpoints:
    """The folder `checkpoints` of a workdir, which keeps two: the latest and the best.

    Saving goes on in the background; leaving the `with` block waits for it.
    """

    def __init__(self, folder: Path, selection: str, lower_is_better: bool) -> None:
        """The best is the one with the lowest, or highest, metric `selection`; the later of two.

        Raises:
          UserError: the folder cannot be written.
        """
        self._selection = selection

        def selected(metrics: dict[str, float]) -> float:
            return metrics[selection]

        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(1),
                preservation_policy.BestN(
                    get_metric_fn=selected,
                    reverse=lower_is_better,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=selected,
            best_mode="min" if lower_is_better else "max",
            preservation_policy=policy,
        )
        try:
            self._manager = ocp.CheckpointManager(
                folder.absolute() / "checkpoints",
                options=options,
                item_handlers=ocp.StandardCheckpointHandler(),  # for `item_metadata`
            )
        except OSError as error:
            raise UserError(f"--workdir={folder} cannot be written: {error.strerror}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def save(self, state: TrainState, validation: dict[str, float] | None) -> None:
        """Saves `state` at its step; finite `validation` makes it a candidate for the best."""
        if validation and not math.isfinite(validation[self._selection]):
            validation = None
        content = ocp.args.StandardSave(serialization.to_state_dict(state))
        self._manager.save(int(state.step), args=content, metrics=validation)

    def latest_step(self) -> int | None:
        """The update of the latest checkpoint, if there is any."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The update of the best checkpoint, if one has been validated."""
        self._manager.wait_until_finished()
        return self._manager.best_step()

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The checkpoint of an update, in the form of `state`."""
        like = ocp.args.StandardRestore(serialization.to_state_dict(state))
        return serialization.from_state_dict(state, self._manager.restore(step, args=like))

    def restore_variables(self, step: int) -> dict[str, Any]:
        """The model's variables in the checkpoint of an update, whatever they are."""
        # Into NumPy arrays: the machine that saved them may have had other devices.
        saved = dict(self._manager.item_metadata(step))
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
        state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        return {name: state[name] for name in ("params", "batch_stats") if state[name]}


def read_best(folder: Path) -> tuple[int, dict[str, Any], str]:
    """The best checkpoint so far of the run in `folder`, which may still be going on.

    Returns:
      Its update; the model's variables, with re-estimated population statistics where they have
      been saved; and which statistics there are: `population`, `running`, or `none`.

    Raises:
      UserError: there is no run, or no checkpoint that has been validated.
    """
    record = workdir.read_record(folder)
    if "selection" not in record:
        raise UserError(
            f"{folder / 'run.json'} is of an earlier version: start the run again, to complete it"
        )
    nothing = UserError(f"--workdir={folder} holds no validated checkpoint yet")
    if not (folder / "checkpoints").is_dir():  # nor is the folder made here
        raise nothing
    with Checkpoints(folder, record["selection"], record["lower_is_better"]) as checkpoints:
        update = checkpoints.best_step()
        if update is None:
            raise nothing
        variables = checkpoints.restore_variables(update)
    if "batch_stats" not in variables:
        return update, variables, "none"
    population = workdir.read_statistics(folder, update)
    if population is None:
        return update, variables, "running"
    return update, {**variables, "batch_stats": population}, "population"
