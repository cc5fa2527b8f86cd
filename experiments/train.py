"""The training loop, which all tasks share."""

import contextlib
import dataclasses
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments import parallel, tasks
from experiments.config import has_batch_statistics
from experiments.evaluate import Check, Evaluator
from experiments.parallel import BatchSharding, Devices
from experiments.records import boards, metrics, milestones, results_file, workdir
from experiments.records.checkpoints import Checkpoints, check_not_lost
from experiments.runtime import finite, processes
from experiments.runtime.errors import Stopped, UserError
from experiments.runtime.interruption import Interruption
from experiments.train_step import (
    TrainState,
    create_state,
    make_train_step,
    random_keys,
    variables_of,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run other than its state.

    Attributes:
      config: the run's config.
      folder: the workdir.
      devices: the devices that share its batches.
      task: data, model and metrics.
      noise: the key for noise in updates and evaluations.
      evaluator: evaluates the model.
    """

    config: ConfigDict
    folder: Path
    devices: Devices
    task: tasks.Task
    noise: jax.Array
    evaluator: Evaluator

    @classmethod
    def load(cls, config: ConfigDict, folder: Path) -> "Setup":
        """Loads devices and data, and checks the data against the run in `folder`, if there is one.

        Raises:
          UserError: devices or data do not fit the config or the run, or differ between processes.
        """
        devices = parallel.make(config)
        task = tasks.load(config, devices)
        processes.check_same(task.record, "data: ")
        processes.on_first(lambda: workdir.check_record(task.record, folder))
        _, noise = random_keys(config.seed)
        return cls(config, folder, devices, task, noise, Evaluator(task, config, noise, devices))

    @property
    def title(self) -> str:
        """Names the run in its output, such as `pmnist bn_lstm`."""
        return f"{self.task.data} {self.config.model.kind}"

    @property
    def record(self) -> dict[str, Any]:
        """Facts that a run saves, and that must stay the same when it continues."""
        if not has_batch_statistics(self.config):
            return self.task.record
        rows = self.devices.statistics_rows(self.config.batch_size)
        return {**self.task.record, "statistics_rows": rows}

    def warn_of_other_rows(self) -> None:
        """Logs a warning if batch statistics are over other rows than in training."""
        ours = self.record
        if "statistics_rows" not in ours or not (self.folder / "run.json").exists():
            return
        records = ours, workdir.read_record(self.folder)
        here, there = (each.get("statistics_rows") or self.config.batch_size for each in records)
        if here != there:
            told = "batch statistics are over %s examples in this evaluation, over %s in training"
            logging.warning(told, here, there)

    def checkpoints(self, read_only: bool = False) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(
            self.folder, self.task.selection, self.task.lower_is_better, read_only=read_only
        )


@dataclasses.dataclass
class Training:
    """Training in progress.

    Attributes:
      setup: the parts of the run.
      checkpoints: where it saves.
      state: the state after the last update.
      done: number of updates so far.
      saved: the update of the latest checkpoint, None if there is none.
    """

    setup: Setup
    checkpoints: Checkpoints
    state: TrainState
    done: int
    saved: int | None

    @classmethod
    def start(cls, setup: Setup, checkpoints: Checkpoints, state: TrainState) -> "Training":
        """Starts at the latest checkpoint, or from the initial `state` if there is none.

        Raises:
          UserError: the checkpoint is past `config.num_updates`.
        """
        saved = checkpoints.latest_step()
        if saved is not None:
            state = checkpoints.restore(saved, state)
        else:
            state = processes.from_first(state)  # processors may round initial values differently
        done, total = int(state.step), setup.config.num_updates
        if done > total:
            raise UserError(
                f"config.num_updates is {total}, and the run in {setup.folder} is at update "
                f"{done}: increase config.num_updates, or use --mode=evaluate"
            )
        return cls(setup, checkpoints, setup.devices.replicate(state), done, saved)

    def run(self, reporter: metrics.Reporter, interruption: Interruption) -> None:
        """Makes the remaining updates. Logs, validates and saves when they are due.

        Raises:
          RunFailed: an update would introduce a non-finite value.
          Stopped: a signal arrived. The last update is saved.
        """
        config, task, devices = self.setup.config, self.setup.task, self.setup.devices
        train_step = make_train_step(task, self.setup.noise)
        expected = milestones.of(config)
        while self.done < config.num_updates:
            updates = range(self.done, self.done + updates_at_once(config, self.done))
            for batches, sharding in calls(task, devices, updates):
                self.state = train_step(self.state, *batches, sharding=sharding)
            self.done = updates.stop

            last = self.done == config.num_updates
            log = last or self.done % config.log_every == 0
            validate = last or self.done % config.eval_every == 0
            save = validate or self.done % config.checkpoint_every == 0
            if log or save:
                self.check_finite()
            if log or save or reporter.due():
                jax.block_until_ready(self.state.refused)
                reporter.advance(self.done)
            if log:
                self.log(reporter)
            validation = None
            if validate:
                validation = self.validate(reporter, expected.get(self.done))
            stop = interruption.requested()
            if save or stop is not None:
                self.save(reporter, validation)
            if stop is not None:
                raise Stopped(
                    f"{signal.Signals(stop).name}: stopped after update {self.done:,} of "
                    f"{config.num_updates:,}, which is saved; run the same command to continue",
                    stop,
                )
            if log or save:
                reporter.start_timing(self.done)

    @property
    def statistics(self) -> str:
        """The statistics that normalise in training and validation."""
        return "batch" if self.state.batch_stats else "none"

    def check_finite(self) -> None:
        """Stops a run whose last update was refused.

        Raises:
          RunFailed: names the update, the first non-finite value, and the latest checkpoint.
        """
        refused = jax.device_get(self.state.refused)
        if not np.any(refused):
            return
        self.done = int(self.state.step)
        names = finite.names(self.state.params, self.state.batch_stats)
        latest = "there is no checkpoint yet"
        if self.saved is not None:
            latest = f"the latest checkpoint, of update {self.saved}, is in {self.setup.folder}"
        raise processes.RunFailed(
            f"update {self.done + 1} was not applied: "
            f"{finite.describe(names, refused)}; {latest}; try a lower "
            "config.optimizer.learning_rate in another workdir"
        )

    def log(self, reporter: metrics.Reporter) -> None:
        """Reports training metrics, averaged over the updates since the last log."""
        window = jax.device_get(self.state.window)
        averages = {name: float(total / count) for name, (total, count) in window.items()}
        row = {"update": self.done, "split": "train", "statistics": self.statistics}
        more = {"learning_rate": self.setup.config.optimizer.learning_rate}
        reporter.write(row, averages, more | reporter.speed())
        self.state = self.state.replace(window=jax.tree.map(jnp.zeros_like, self.state.window))

    def validate(
        self, reporter: metrics.Reporter, milestone: milestones.Milestone | None
    ) -> dict[str, float]:
        """Validates and reports; the metrics choose the best checkpoint."""
        config, reading = self.setup.config, self.setup.task.readings[0]
        split, statistics = reading.splits[0], self.statistics
        validation = self.setup.evaluator.evaluate(
            variables_of(self.state), reading, split, statistics, config.batch_size
        )
        reporter.write({"update": self.done, **reading.row(split, statistics)}, validation)
        if milestone is not None:
            reporter.print(f"  {milestone.tell(validation[milestone.metric])}")
        return validation

    def save(self, reporter: metrics.Reporter, validation: dict[str, float] | None) -> None:
        """Saves a checkpoint, and the metrics before it.

        Raises:
          UserError: the last update was refused, or a file cannot be written.
        """
        self.check_finite()
        reporter.sync()
        self.checkpoints.save(self.state, validation)
        self.saved = self.done


def updates_at_once(config: ConfigDict, done: int) -> int:
    """The number of updates for the next call: `config.updates_per_call`, or 1 near a boundary.

    A call never crosses a log, evaluation or checkpoint boundary. So a run that is stopped and
    continued makes the same calls.
    """
    at_once = config.updates_per_call
    every = (config.log_every, config.eval_every, config.checkpoint_every)
    free = min(config.num_updates - done, *(n - done % n for n in every))
    return at_once if free >= at_once else 1


def placed_batch(
    task: tasks.Task, devices: Devices, update: int
) -> tuple[tasks.Batch, BatchSharding]:
    """The batch of an update, on the devices, and its sharding."""
    sharding = devices.sharding(len(task.train_indices(update)), task.shared)
    return sharding.place(task.train_batch(update, devices.share)), sharding


def calls(
    task: tasks.Task, devices: Devices, updates: range
) -> list[tuple[list[tasks.Batch], BatchSharding]]:
    """The train step's calls for some updates: for each call, its batches and their sharding.

    If all batches have equal shapes, they go into one call; otherwise each has its own.
    """
    placed = [placed_batch(task, devices, update) for update in updates]
    shapes = {tuple(map(np.shape, jax.tree.leaves(batch))) for batch, _ in placed}
    if len(shapes) > 1:
        return [([batch], sharding) for batch, sharding in placed]
    _, sharding = placed[0]
    return [([batch for batch, _ in placed], sharding)]


def train(
    config: ConfigDict, folder: Path, profile: bool = False, more: bool = False
) -> dict[str, Any]:
    """Trains, or continues to train, the run in `folder`, and evaluates its best checkpoint.

    Args:
      config: the run's config.
      folder: the workdir.
      profile: JAX's profiler traces all updates into the folder `profile`.
      more: other runs follow: a signal stops them even if it arrives at the very end of this one.

    Returns:
      The content of `results.json` in the folder: see `evaluate_best`.

    Raises:
      UserError: config, data or folder do not match, or the run's checkpoints are gone.
      RunFailed: an update would introduce a non-finite value, or no checkpoint has been validated.
      Stopped: a signal arrived. The last update is saved.
    """
    # Nothing is written before config, data and folder have been checked.
    processes.on_first(lambda: workdir.check(config, folder))
    setup = Setup.load(config, folder)
    task, first = setup.task, processes.is_first()
    state = create_state(task, config)
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(workdir.in_use(folder))
            # Check again under the lock: another run may have used the folder until now.
            workdir.check(config, folder)
            workdir.check_record(setup.record, folder)
            check_not_lost(config, folder)
        interruption = stack.enter_context(Interruption(more))
        checkpoints = stack.enter_context(setup.checkpoints())
        training = Training.start(setup, checkpoints, state)
        del state  # frees the devices' memory; training has its own
        start, total = training.done, config.num_updates
        if start == total:
            results = processes.on_first(lambda: finished(config, folder, checkpoints))
            if results is not None:
                return results

        shown: list[boards.Board] = []
        if first:
            choice = {"selection": task.selection, "lower_is_better": task.lower_is_better}
            record = setup.record | choice
            workdir.open_workdir(config, folder, record, task.implementation)
            stack.callback(lambda: workdir.record_end(folder, training.done))
            shown = stack.enter_context(boards.opened(folder, config, start))
        trace = jax.profiler.trace(folder / "profile") if profile and first else None
        with (
            metrics.Reporter(folder, setup.title, task.data, start, total, shown) as reporter,
            trace or contextlib.nullcontext(),
        ):
            parameters = sum(leaf.size for leaf in jax.tree.leaves(training.state.params))
            reporter.print(
                f"{setup.title}: {parameters:,} parameters, update {start:,} of {total:,}, "
                f"on {setup.devices}, in {folder}",
                *(f"  {note}" for note in task.notes),
            )
            training.run(reporter, interruption)
        interruption.check()
        results = evaluate_best(setup, training.state, checkpoints, interruption.check)
        boards.write_results(shown, results)
        return results


def finished(config: ConfigDict, folder: Path, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The results of a run that needs no evaluation; None if their checkpoint was damaged."""
    results = results_file.read_finished(folder, config, config.num_updates)
    return None if results and checkpoints.has_put_aside(results["update"]) else results


def evaluate_best(
    setup: Setup, state: TrainState, checkpoints: Checkpoints, check: Check
) -> dict[str, Any]:
    """Evaluates the best checkpoint in every way, and writes `results.json`.

    An earlier file's rows for the same checkpoint stay if their readings are not evaluated now.
    Re-estimated population statistics go into `population_statistics.npz`. `state` gives the
    shapes; `check` is called between batches.

    Returns:
      The content of the file: the name of the `data`; the `kind` of model; the `update` of the best
      checkpoint; the `updates` trained; `selection`, the metric that chose the checkpoint; the
      metrics to be `shown`; the config's fields for `evaluation`; and `rows`, the metrics by split,
      statistics and reading.

    Raises:
      RunFailed: no checkpoint has been validated.
      Stopped: a signal arrived.
    """
    task, config, folder = setup.task, setup.config, setup.folder
    best_step = checkpoints.best_step()
    if best_step is None:
        raise processes.RunFailed(
            f"--workdir={folder} holds no checkpoint to evaluate: train until a validation has a "
            f"finite {task.selection}"
        )
    variables = setup.devices.replicate(variables_of(checkpoints.restore(best_step, state)))
    population = None
    if state.batch_stats:
        population = setup.evaluator.population_statistics(variables, check)
        if processes.is_first():
            workdir.write_statistics(folder, best_step, population)
    rows = setup.evaluator.evaluate_all(variables, population, check)
    results = {
        "data": task.data,
        "kind": config.model.kind,
        "update": best_step,
        "updates": checkpoints.latest_step(),
        "selection": task.selection,
        "shown": list(task.shown),
        "evaluation": results_file.evaluation_fields(config),
        "rows": list(rows),
    }
    return results_file.write(folder, results) if processes.is_first() else results


def evaluate_run(config: ConfigDict, folder: Path, more: bool = False) -> dict[str, Any]:
    """Evaluates the best checkpoint of the run in `folder`; see `evaluate_best` and `train`."""
    processes.on_first(lambda: workdir.check_exists(config, folder))
    setup = Setup.load(config, folder)
    if processes.is_first():
        setup.warn_of_other_rows()
    state = create_state(setup.task, config)
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(workdir.in_use(folder))
        interruption = stack.enter_context(Interruption(more))
        checkpoints = stack.enter_context(setup.checkpoints(read_only=True))
        results = evaluate_best(setup, state, checkpoints, interruption.check)
        if processes.is_first():
            with boards.opened(folder, config) as shown:
                boards.write_results(shown, results)
        return results
