"""The training loop, which all tasks share."""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from ml_collections import ConfigDict

from experiments import evaluate, parallel, tasks
from experiments.optimizers import make_optimizer
from experiments.parallel import ONE_DEVICE, Devices
from experiments.records import boards, metrics, milestones, results_file, workdir
from experiments.records.checkpoints import Checkpoints
from experiments.runtime import finite, processes
from experiments.runtime.errors import Stopped, UserError
from experiments.runtime.interruption import Interruption


class TrainState(train_state.TrainState):
    """Parameters, optimiser, step, and everything else that a run needs to continue.

    Attributes:
      batch_stats: running averages of batch statistics.
      window: sums and counts of training metrics, and of `gradient_norm` over updates, since the
        last log.
      refused: for each value of `finite.names`, whether the next update would have made it
        non-finite. Once any is True, no update is applied.
    """

    batch_stats: Any
    window: tasks.Metrics
    refused: jax.Array


def random_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a run: for initial parameters, and for noise.

    The n-th batch gets the same noise in training, in every evaluation and in re-estimation.
    """
    return tuple(jax.random.split(jax.random.key(seed)))


def gradient_norm(gradients: Any) -> tuple[jax.Array, jax.Array]:
    """The global norm of one update's gradient, as the sum and the count of a metric."""
    return optax.tree.norm(gradients), jnp.ones(())


def create_state(task: tasks.Task, config: ConfigDict) -> TrainState:
    """The state before the first update."""
    # Only the batch's shapes are used, which are the same in all processes.
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), dict(task.train_batch(0))
    )
    key, _ = random_keys(config.seed)

    def init() -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
        return task.model.init(key, *task.inputs(zeros), use_running_average=True)

    def metrics_of(variables: Any, batch: tasks.Batch) -> tasks.Metrics:
        outputs = task.model.apply(
            variables, *task.inputs(batch), use_running_average=True, rngs={"noise": key}
        )
        return task.metrics(outputs, batch)

    variables = jax.jit(init)()
    window = {
        **jax.eval_shape(metrics_of, variables, batch),
        "gradient_norm": jax.eval_shape(gradient_norm, variables["params"]),
    }
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    state = TrainState.create(
        apply_fn=task.model.apply,
        params=params,
        tx=make_optimizer(config.optimizer),
        batch_stats=batch_stats,
        window=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), window),
        refused=jnp.zeros(len(finite.names(params, batch_stats)), bool),
    )
    return state.replace(step=jnp.zeros((), jnp.int32))


def variables_of(state: TrainState) -> dict[str, Any]:
    """The model's variables: parameters, and statistics if it has any."""
    if not state.batch_stats:
        return {"params": state.params}
    return {"params": state.params, "batch_stats": state.batch_stats}


def update(
    task: tasks.Task,
    noise: jax.Array,
    devices: Devices,
    split: bool,
    state: TrainState,
    batch: tasks.Batch,
) -> TrainState:
    """One update, as every device runs it: gradient of the mean loss, optimiser, statistics.

    If `split`, each device has its own rows. An update that would introduce non-finite values only
    sets `refused`; every later update changes nothing.
    """
    key = devices.fold_in(jax.random.fold_in(noise, state.step), split)

    def loss_of(params: Any) -> tuple[jax.Array, tuple[tasks.Metrics, Any]]:
        outputs, updated = task.model.apply(
            {**variables_of(state), "params": params},
            *task.inputs(batch),
            use_running_average=False,
            rngs={"noise": key, "dropout": jax.random.fold_in(key, 1)},
            mutable=["batch_stats"],
        )
        batch_metrics = task.metrics(outputs, batch)
        total, count = batch_metrics["loss"]
        # A device's part of the mean over the whole batch; gradients are added up below.
        loss = total / devices.total(count, split)
        return loss, (batch_metrics, updated.get("batch_stats", {}))

    gradients, (batch_metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    gradients = devices.total(gradients, split)
    batch_metrics = devices.total(batch_metrics, split)
    # Before clipping. The optimiser computes the norm too; XLA computes it once.
    batch_metrics["gradient_norm"] = gradient_norm(gradients)
    after = state.apply_gradients(
        grads=gradients,
        batch_stats=devices.mean_of_groups(batch_stats),
        window=jax.tree.map(jnp.add, state.window, batch_metrics),
    )
    loss, _ = batch_metrics["loss"]
    refused = finite.not_finite(after.params, after.batch_stats, gradients, loss)
    refused = jnp.where(jnp.any(state.refused), state.refused, refused)
    after = jax.tree.map(functools.partial(jnp.where, jnp.any(refused)), state, after)
    return after.replace(refused=refused)


def make_train_step(
    task: tasks.Task, noise: jax.Array, devices: Devices = ONE_DEVICE
) -> Callable[..., TrainState]:
    """The compiled train step: maps a state, a batch and `split` to the state after an `update`.

    It also takes several batches of equal shapes, for as many updates in one call. It reuses the
    memory of the given state.
    """

    def one(split: bool, state: TrainState, batch: tasks.Batch) -> TrainState:
        function = functools.partial(update, task, noise, devices, split)
        return devices.run(function, split, task.shared)(state, batch)

    def several(
        split: bool, state: TrainState, shared: tasks.Batch, own: list[tasks.Batch]
    ) -> TrainState:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
        step = lambda state, batch: (one(split, state, {**shared, **batch}), None)  # noqa: E731
        return jax.lax.scan(step, state, stacked)[0]

    call_one = jax.jit(one, static_argnums=0, donate_argnums=1)
    call_several = jax.jit(several, static_argnums=0, donate_argnums=1)

    def train_step(state: TrainState, *batches: tasks.Batch, split: bool = False) -> TrainState:
        first, *others = batches
        if not others:
            return call_one(split, state, first)
        # Shared entries, such as the text, are not copied for each batch.
        shared = {k: v for k, v in first.items() if k in task.shared}
        own = [{k: v for k, v in batch.items() if k not in shared} for batch in batches]
        return call_several(split, state, shared, own)

    return train_step


def updates_at_once(config: ConfigDict, done: int) -> int:
    """The number of updates for the next call: `config.updates_per_call`, or 1 near a boundary.

    A call never crosses a log, evaluation or checkpoint boundary. So a run that is stopped and
    continued makes the same calls.
    """
    at_once = config.updates_per_call
    every = (config.log_every, config.eval_every, config.checkpoint_every)
    free = min(config.num_updates - done, *(n - done % n for n in every))
    return at_once if free >= at_once else 1


def calls(task: tasks.Task, devices: Devices, updates: range) -> list[tuple[list, bool]]:
    """The train step's calls for some updates: for each call, its batches on devices, and `split`.

    If all batches have equal shapes, they go into one call; otherwise each has its own.
    """
    splits = [devices.splits(len(task.train_indices(update))) for update in updates]
    batches = [
        devices.place(task.train_batch(update, devices.share), split, task.shared)
        for update, split in zip(updates, splits, strict=True)
    ]
    shapes = {tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches}
    if len(shapes) == 1:
        return [(batches, splits[0])]
    return [([batch], split) for batch, split in zip(batches, splits, strict=True)]


def check_finite(state: TrainState, folder: Path, saved: int | None) -> None:
    """Stops a run whose last update was refused.

    Raises:
      UserError: names the update, the first non-finite value, and the checkpoint `saved`.
    """
    refused = jax.device_get(state.refused)
    if not np.any(refused):
        return
    names = finite.names(state.params, state.batch_stats)
    latest = "there is no checkpoint yet"
    if saved is not None:
        latest = f"the latest checkpoint, of update {saved}, is in {folder}"
    raise processes.Everywhere(
        f"update {int(state.step) + 1} was not applied: "
        f"{finite.describe(names, refused)}; {latest}; try a lower "
        "config.optimizer.learning_rate in another workdir"
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
      evaluator: see `evaluate.make_evaluator`.
    """

    config: ConfigDict
    folder: Path
    devices: Devices
    task: tasks.Task
    noise: jax.Array
    evaluator: evaluate.Evaluator

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
        evaluator = evaluate.make_evaluator(task, noise, devices)
        return cls(config, folder, devices, task, noise, evaluator)

    def checkpoints(self, read_only: bool = False) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(
            self.folder, self.task.selection, self.task.lower_is_better, read_only=read_only
        )


def train(config: ConfigDict, folder: Path, profile: bool = False) -> dict[str, Any]:
    """Trains, or continues to train, the run in `folder`, and evaluates its best checkpoint.

    With `profile`, JAX's profiler traces all updates into the folder `profile`.

    Returns:
      The content of `results.json` in the folder: see `evaluate_best`.

    Raises:
      UserError: config, data or folder do not match, or an update would introduce a non-finite
        value.
      Stopped: a signal arrived. The last update is saved.
    """
    # ---- Set up. Nothing is written before config, data and folder have been checked.
    processes.on_first(lambda: workdir.check(config, folder))
    setup = Setup.load(config, folder)
    task, devices = setup.task, setup.devices
    record = {**task.record, "statistics_rows": devices.statistics_rows(config.batch_size)}
    state = create_state(task, config)
    train_step = make_train_step(task, setup.noise, devices)
    statistics = "batch" if state.batch_stats else "none"
    reading, first = task.readings[0], processes.is_first()

    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(workdir.in_use(folder))
            # Check again under the lock: another run may have used the folder until now.
            workdir.check(config, folder)
            workdir.check_record(record, folder)
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(setup.checkpoints())
        if (saved := checkpoints.latest_step()) is not None:
            state = checkpoints.restore(saved, state)
        else:
            state = processes.from_first(state)  # processors may round initial values differently
        state = devices.replicate(state)
        start = done = int(state.step)
        if start > config.num_updates:
            raise UserError(
                f"config.num_updates is {config.num_updates}, and the run in {folder} is at update "
                f"{start}: increase config.num_updates, or use --mode=evaluate"
            )
        if start == config.num_updates:
            results = processes.on_first(lambda: results_file.read_finished(folder, config, start))
            if results is not None:
                return results
        if first:
            choice = {"selection": task.selection, "lower_is_better": task.lower_is_better}
            workdir.open_workdir(config, folder, {**record, **choice}, task.implementation)
            stack.callback(lambda: workdir.record_end(folder, done))
        shown = stack.enter_context(boards.opened(folder, config, start)) if first else []
        title = f"{task.data} {config.model.kind}"
        expected = milestones.of(config)

        # ---- Train.
        total = config.num_updates
        trace = jax.profiler.trace(folder / "profile") if profile and first else None
        with (
            metrics.Reporter(folder, title, task.data, start, total, shown) as reporter,
            trace or contextlib.nullcontext(),
        ):
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            reporter.print(
                f"{title}: {parameters:,} parameters, update {start:,} of {total:,}, "
                f"on {devices}, in {folder}",
                *(f"  {note}" for note in task.notes),
            )
            while done < total:
                updates = range(done, done + updates_at_once(config, done))
                for batches, split in calls(task, devices, updates):
                    state = train_step(state, *batches, split=split)
                done = updates.stop
                last = done == total
                log = last or done % config.log_every == 0
                validate = last or done % config.eval_every == 0
                save = validate or done % config.checkpoint_every == 0

                if log or save:
                    check_finite(state, folder, saved)
                if log or save or reporter.due():
                    jax.block_until_ready(state.refused)
                    reporter.advance(done)
                if log:
                    window = jax.device_get(state.window)
                    averages = {name: float(s) / float(n) for name, (s, n) in window.items()}
                    row = {"update": done, "split": "train", "statistics": statistics}
                    more = {"learning_rate": config.optimizer.learning_rate}
                    reporter.write(row, averages, more | reporter.speed())
                    state = state.replace(window=jax.tree.map(jnp.zeros_like, state.window))

                # Validation uses batch statistics and chooses the best checkpoint.
                validation = None
                if validate:
                    row = {"update": done, **reading.row(reading.splits[0], statistics)}
                    validation = setup.evaluator(
                        variables_of(state), reading, row["split"], config.batch_size, False
                    )
                    reporter.write(row, validation)
                    if milestone := expected.get(done):
                        reporter.print(f"  {milestone.tell(validation[milestone.metric])}")
                stop = interruption.requested()
                if save or stop is not None:
                    check_finite(state, folder, saved)
                    reporter.sync()
                    checkpoints.save(state, validation)
                    saved = done
                if stop is not None:
                    raise Stopped(
                        f"{signal.Signals(stop).name}: stopped after update {done:,} of "
                        f"{total:,}, which is saved; run the same command to continue",
                        stop,
                    )
                if log or save:
                    reporter.start_timing(done)

        # ---- Evaluate the best checkpoint.
        interruption.check()
        results = evaluate_best(setup, state, checkpoints, interruption.check)
        boards.write_results(shown, results)
        return results


def evaluate_best(
    setup: Setup, state: TrainState, checkpoints: Checkpoints, check: evaluate.Check
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
      UserError: no checkpoint has been validated.
      Stopped: a signal arrived.
    """
    task, config, folder, devices = setup.task, setup.config, setup.folder, setup.devices
    best_step = checkpoints.best_step()
    if best_step is None:
        raise UserError(
            f"--workdir={folder} holds no checkpoint to evaluate: train until a validation has a "
            f"finite {task.selection}"
        )
    variables = devices.replicate(variables_of(checkpoints.restore(best_step, state)))
    population = None
    if state.batch_stats:
        population = evaluate.population_statistics(
            task, config, variables, setup.noise, devices, check
        )
        if processes.is_first():
            workdir.write_statistics(folder, best_step, population)
    rows = evaluate.evaluate_all(task, config, variables, population, setup.evaluator, check)
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


def evaluate_run(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Evaluates the best checkpoint of the run in `folder`; see `evaluate_best`."""

    def check_folder() -> None:
        workdir.read_config(folder)  # refuses a folder without a run
        workdir.check(config, folder)

    processes.on_first(check_folder)
    setup = Setup.load(config, folder)
    state = create_state(setup.task, config)
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(workdir.in_use(folder))
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(setup.checkpoints(read_only=True))
        results = evaluate_best(setup, state, checkpoints, interruption.check)
        if processes.is_first():
            with boards.opened(folder, config) as shown:
                boards.write_results(shown, results)
        return results
