"""The training loop: one for every task, read from top to bottom."""

import contextlib
import functools
import json
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from ml_collections import ConfigDict

from experiments import evaluate, parallel, tasks
from experiments.models import layers
from experiments.optimizers import make_optimizer
from experiments.parallel import ONE_DEVICE, Parallel
from experiments.records import boards, metrics, milestones, workdir
from experiments.records.checkpoints import Checkpoints
from experiments.runtime import files, finite, processes
from experiments.runtime.errors import Stopped, UserError
from experiments.runtime.interruption import Interruption

RESULTS_NAME = "results.json"


class TrainState(train_state.TrainState):
    """Parameters, optimiser and step, with what else a run goes on from.

    Attributes:
      batch_stats: running averages of batch statistics.
      window: sums and counts of training metrics, and of `gradient_norm` over updates, since they
        were last written.
      refused: which of the numbers of `watched` were not finite in the update after this state. It
        was not applied, nor is any other.
    """

    batch_stats: Any
    window: tasks.Metrics
    refused: jax.Array


def watched(state: TrainState) -> dict[str, Any]:
    """The names of what has to stay finite; see `finite.watched`."""
    return finite.watched(state.params, state.batch_stats, state.params, state.step)


def random_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a run: of its initial parameters, and of noise in its updates."""
    return tuple(jax.random.split(jax.random.key(seed)))


def gradient_norm(gradients: Any) -> tuple[jax.Array, jax.Array]:
    """The global norm, as a sum over one update and their number."""
    return optax.tree.norm(gradients), jnp.ones(())


def create_state(task: tasks.Task, config: ConfigDict) -> TrainState:
    """The state before the first update."""
    # Shapes alone count: every process has the same, whatever its share of the data.
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
    state = TrainState.create(
        apply_fn=task.model.apply,
        params=variables["params"],
        tx=make_optimizer(config.optimizer),
        batch_stats=variables.get("batch_stats", {}),
        window=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), window),
        refused=None,
    )
    nothing = jnp.zeros(len(watched(state)), bool)
    return state.replace(step=jnp.zeros((), jnp.int32), refused=nothing)


def variables_of(state: TrainState) -> dict[str, Any]:
    """What the model is applied to: parameters, and statistics if it has any."""
    if not state.batch_stats:
        return {"params": state.params}
    return {"params": state.params, "batch_stats": state.batch_stats}


def make_train_step(task: tasks.Task, noise: jax.Array, parallel: Parallel = ONE_DEVICE):
    """One update: gradient of the mean loss, optimiser, running statistics, metrics.

    What it returns takes several batches too, of equal shapes, for as many updates in one call;
    with `split`, the devices of `parallel` share them. The update changes nothing if it would bring
    in numbers that are not finite, or if one before it would have.
    """

    def update(split: bool, state: TrainState, batch: tasks.Batch) -> TrainState:
        key = parallel.fold_in(jax.random.fold_in(noise, state.step), split)

        def loss_of(params):
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
            loss = total / parallel.total(count, split)
            return loss, (batch_metrics, updated.get("batch_stats", {}))

        gradients, (batch_metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
        gradients = parallel.total(gradients, split)
        batch_metrics = parallel.total(batch_metrics, split)
        # Before it is clipped; the optimiser computes it too, and XLA does so once.
        batch_metrics["gradient_norm"] = gradient_norm(gradients)
        after = state.apply_gradients(
            grads=gradients,
            batch_stats=parallel.mean_of_groups(batch_stats),
            window=jax.tree.map(jnp.add, state.window, batch_metrics),
        )
        numbers = finite.watched(
            after.params, after.batch_stats, gradients, batch_metrics["loss"][0]
        )
        stopped = jnp.any(state.refused)
        refused = jnp.where(stopped, state.refused, finite.not_finite(numbers))
        after = jax.tree.map(functools.partial(jnp.where, jnp.any(refused)), state, after)
        return after.replace(refused=refused)

    def on_devices(split: bool, state: TrainState, batch: tasks.Batch) -> TrainState:
        return parallel.run(functools.partial(update, split), split, task.shared)(state, batch)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def several(
        split: bool, state: TrainState, shared: tasks.Batch, own: list[tasks.Batch]
    ) -> TrainState:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)

        def body(state: TrainState, batch: tasks.Batch) -> tuple[TrainState, None]:
            return on_devices(split, state, {**shared, **batch}), None

        return jax.lax.scan(body, state, stacked)[0]

    one = jax.jit(on_devices, static_argnums=0, donate_argnums=1)

    def train_step(state: TrainState, *batches: tasks.Batch, split: bool = False) -> TrainState:
        first, *others = batches
        if not others:
            return one(split, state, first)
        # A text that all batches are cut from is not to be copied for each.
        shared = {k: v for k, v in first.items() if k in task.shared}
        own = [{k: v for k, v in batch.items() if k not in shared} for batch in batches]
        return several(split, state, shared, own)

    return train_step


def updates_at_once(config: ConfigDict, update: int) -> int:
    """How many updates to do next in one call: as many as it may have, or one if less are free.

    Calls end where something is due, so that a run that is stopped and goes on makes the same ones.
    """
    at_once = config.updates_per_call
    every = (config.log_every, config.eval_every, config.checkpoint_every)
    free = min(config.num_updates - update, *(n - update % n for n in every))
    return at_once if free >= at_once else 1


def train(config: ConfigDict, folder: Path, profile: bool = False) -> dict[str, Any]:
    """Trains, or goes on training, the run in `folder`, and evaluates its best checkpoint.

    With `profile`, says where the time of updates went, those aside for which a program was
    compiled.

    Returns:
      What `results.json` in the folder says: see `evaluate_best`.

    Raises:
      UserError: config, data or folder won't do, or a number is not finite any more.
      Stopped: by a signal, after an update that has been saved.
    """
    # ---- Set up. Nothing is written before config, data and folder have been checked.
    processes.on_first(lambda: workdir.check(config, folder))
    devices = parallel.make(config)
    task = tasks.load(config, devices)
    check_record(task, folder)
    state = create_state(task, config)
    _, noise = random_keys(config.seed)
    train_step = make_train_step(task, noise, devices)
    statistics = "batch" if state.batch_stats else "none"
    reading = task.readings[0]
    first = processes.is_first()

    with (
        workdir.in_use(folder) if first else contextlib.nullcontext(),
        Interruption() as interruption,
        Checkpoints(folder, task.selection, task.lower_is_better) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        evaluator = evaluate.make_evaluator(task, noise, devices)
        if (saved := checkpoints.latest_step()) is not None:
            state = checkpoints.restore(saved, state)
        state = devices.replicate(state)
        start = int(state.step)
        if start > config.num_updates:
            raise UserError(
                f"config.num_updates is {config.num_updates}, and the run in {folder} is at update "
                f"{start}: ask for more, or leave it as it is with --mode=evaluate"
            )
        choice = {"selection": task.selection, "lower_is_better": task.lower_is_better}
        if first:
            implementation = layers.implementation(config.model, devices.statistics_axis)
            workdir.open_workdir(config, folder, {**task.record, **choice}, implementation)
        shown = stack.enter_context(boards.opened(folder, config, start)) if first else []
        title = f"{task.data} {config.model.kind}"
        reporting = metrics.Reporter if first else metrics.Silence
        with reporting(folder, title, task.data, start, config.num_updates, shown) as reporter:
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            reporter.console.print(
                f"{title}: {parameters:,} parameters, update {start:,} of {config.num_updates:,}, "
                f"on {devices}, in {folder}"
            )
            for note in task.notes:
                reporter.console.print(f"  {note}")
            expected = milestones.of(config)

            # ---- Train.
            doing = metrics.Stopwatch()
            programs = set()  # by the number and the shapes of the batches they are compiled for
            compiling = 0  # updates for which they were
            done = start
            while done < config.num_updates:
                with doing("input"):
                    at_once = updates_at_once(config, done)
                    batches, splits = [], []
                    for update in range(done, done + at_once):
                        splits.append(devices.splits(task.train_rows(update)))
                        batch = task.train_batch(update, devices.share)
                        batches.append(devices.place(batch, splits[-1], task.shared))
                    shapes = [tuple(map(np.shape, jax.tree.leaves(b))) for b in batches]
                    alike = len(set(shapes)) == 1
                    calls = [batches] if alike else [[b] for b in batches]
                for call, shape, split in zip(calls, shapes, splits, strict=False):
                    program = len(call), shape
                    if program in programs:
                        with doing("dispatch and device"):
                            state = train_step(state, *call, split=split)
                    else:
                        jax.block_until_ready(state)
                        with doing("compilation"):
                            state = jax.block_until_ready(train_step(state, *call, split=split))
                        programs.add(program)
                        compiling += len(call)
                done += at_once
                last = done == config.num_updates
                log = last or done % config.log_every == 0
                validate = last or done % config.eval_every == 0
                stop = interruption.requested()
                save = validate or done % config.checkpoint_every == 0 or stop is not None

                if log or save or reporter.due():
                    with doing("dispatch and device"):
                        refused = jax.device_get(state.refused)
                    if np.any(refused):
                        latest = "there is no checkpoint yet"
                        if saved is not None:
                            latest = f"the latest checkpoint, of update {saved}, is in {folder}"
                        raise UserError(
                            f"update {int(state.step) + 1} was not applied: "
                            f"{finite.describe(watched(state), refused)}; {latest}; a lower "
                            "config.optimizer.learning_rate may help, in another workdir"
                        )
                    with doing("logging"):
                        reporter.advance(done)
                if log:
                    with doing("logging"):
                        window = jax.device_get(state.window)
                        averages = {name: float(s) / float(n) for name, (s, n) in window.items()}
                        row = {"update": done, "split": "train", "statistics": statistics}
                        more = {"learning_rate": config.optimizer.learning_rate}
                        if speed := doing.updates_per_second(done - start - compiling):
                            more["updates_per_second"] = speed
                        reporter.write(row, averages, more)
                        window = jax.tree.map(jnp.zeros_like, state.window)
                        state = state.replace(window=window)

                # ---- Validate, with batch statistics; they choose the best checkpoint.
                validation = None
                if validate:
                    split = reading.splits[0]
                    validation = evaluator(
                        variables_of(state), reading, split, config.batch_size, False
                    )
                    reporter.write({"update": done, **reading.row(split, statistics)}, validation)
                    if milestone := expected.get(done):
                        told = milestone.tell(validation[milestone.metric])
                        reporter.console.print(f"  {told}")
                if save:
                    reporter.sync()
                    checkpoints.save(state, validation)
                    saved = done
                if stop is not None:
                    if first:
                        workdir.record_end(folder, done)
                    raise Stopped(
                        f"{signal.Signals(stop).name}: stopped after update {done:,} of "
                        f"{config.num_updates:,}, which is saved; the same command goes on",
                        stop,
                    )
            interruption.wait_no_more()
            updates = config.num_updates - start
            if updates:
                seconds = doing.seconds.pop("compilation")
                reporter.console.print(
                    f"{updates:,} updates, {len(programs)} programs compiled in {seconds:.1f} s"
                )
            if profile and updates > compiling:
                reporter.console.print(doing.table(updates - compiling))

        # ---- Evaluate the best.
        if start == config.num_updates:
            results = processes.on_first(lambda: finished_results(config, folder, start))
            if results is not None:
                return results
        results = evaluate_best(
            task, config, state, checkpoints, folder, evaluator, devices, interruption
        )
        boards.write_results(shown, results)
        if first:
            workdir.record_end(folder, config.num_updates)
        return results


def finished_results(config: ConfigDict, folder: Path, updates: int) -> dict[str, Any] | None:
    """What `results.json` says, if it is of so many updates and evaluated as `config` has it."""
    path = folder / RESULTS_NAME
    results = files.read_json(path) if path.exists() else {}
    evaluation = evaluation_fields(config)
    if (results.get("updates"), results.get("evaluation")) != (updates, evaluation):
        return None
    return results


def evaluate_best(
    task: tasks.Task,
    config: ConfigDict,
    state: TrainState,
    checkpoints: Checkpoints,
    folder: Path,
    evaluator: evaluate.Evaluator,
    devices: Parallel,
    interruption: Interruption,
) -> dict[str, Any]:
    """Evaluates the best checkpoint in every way, into `results.json`.

    What the file holds of the same checkpoint, read in ways that are not asked for now, stays. The
    re-estimated population statistics go into `population_statistics.npz`.

    Returns:
      The name of the `data`, `kind`, the `update` of the best checkpoint, `updates` trained, the
      metric `selection` that chose it, the metrics to be `shown`, the config's fields on
      `evaluation`, and under `rows` the metrics by split, statistics and reading.

    Raises:
      UserError: no checkpoint has been validated.
      Stopped: by a signal.
    """
    check = interruption.check
    best_step = checkpoints.best_step()
    if best_step is None:
        raise UserError(f"--workdir={folder} holds no validated checkpoint to evaluate yet")
    variables = devices.replicate(variables_of(checkpoints.restore(best_step, state)))
    _, noise = random_keys(config.seed)
    population = None
    if state.batch_stats:
        population = evaluate.population_statistics(task, config, variables, noise, devices, check)
        if processes.is_first():
            workdir.write_statistics(folder, best_step, population)
    results = {
        "data": task.data,
        "kind": config.model.kind,
        "update": best_step,
        "updates": checkpoints.latest_step(),
        "selection": task.selection,
        "shown": list(task.shown),
        "evaluation": evaluation_fields(config),
        "rows": list(evaluate.evaluate_all(task, config, variables, population, evaluator, check)),
    }
    if processes.is_first():
        results["rows"] += other_rows(folder / RESULTS_NAME, results)
        files.write_json(folder / RESULTS_NAME, results)
    return results


def evaluation_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields on which the final evaluation depends, as JSON has them."""
    fields = json.loads(config.to_json_best_effort())
    return {name: fields[name] for name in workdir.EVALUATION_FIELDS if name in fields}


def other_rows(path: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier `results.json` that are as good as the new ones, and not among them."""
    if not path.exists():
        return []
    earlier = files.read_json(path)

    def model(results: dict[str, Any]) -> tuple[Any, ...]:
        fields = results.get("evaluation", {})
        population = [fields.get(name) for name in workdir.POPULATION_FIELDS]
        return results.get("update"), *population

    if model(earlier) != model(results):
        return []

    def way(row: dict[str, Any]) -> tuple[str, ...]:
        return row["split"], row["statistics"], row.get("reading", "")

    known = set(map(way, results["rows"]))
    return [row for row in earlier["rows"] if way(row) not in known]


def evaluate_run(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Evaluates the best checkpoint of the run in `folder`; see `evaluate_best`."""

    def check_folder() -> None:
        workdir.read_config(folder)  # refuses a folder without a run
        workdir.check(config, folder)

    processes.on_first(check_folder)
    devices = parallel.make(config)
    task = tasks.load(config, devices)
    check_record(task, folder)
    state = create_state(task, config)
    _, noise = random_keys(config.seed)
    evaluator = evaluate.make_evaluator(task, noise, devices)
    choice = task.selection, task.lower_is_better
    with (
        workdir.errors_told(folder),
        Interruption() as interruption,
        Checkpoints(folder, *choice, read_only=True) as checkpoints,
    ):
        interruption.wait_no_more()
        results = evaluate_best(
            task, config, state, checkpoints, folder, evaluator, devices, interruption
        )
        if processes.is_first():
            with boards.opened(folder, config) as shown:
                boards.write_results(shown, results)
        return results


def check_record(task: tasks.Task, folder: Path) -> None:
    """Refuses data that are not those of the run in `folder`, or not the same on all processes.

    Raises:
      UserError: names what differs.
    """
    processes.check_same(task.record, "data: ")
    processes.on_first(lambda: workdir.check_record(task.record, folder))
