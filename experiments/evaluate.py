"""Evaluation with batch statistics, running averages or re-estimated population statistics."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from bnlstm_jax import estimate_population_statistics
from experiments.parallel import ONE_DEVICE, Devices
from experiments.records.metrics import describe
from experiments.runtime.progress import track
from experiments.tasks import Adapt, Batch, Metrics, Reading, Task, batch_size_field

Variables = dict[str, Any]
Evaluator = Callable[..., dict[str, float]]
Check = Callable[[], None]  # called between batches; may raise
BATCH_INPUTS = "population_batch_inputs"  # see `Task.batch_inputs`


class Options(NamedTuple):
    """How a batch is evaluated.

    Attributes:
      use_running_average: normalise by the variables' `batch_stats`, not by batch statistics.
      continued: the batch starts from the carry of the batch before it.
      split: each device has its own rows.
      adapt: changes the variables for the batch, such as `Task.batch_inputs`.
    """

    use_running_average: bool
    continued: bool
    split: bool
    adapt: Adapt | None


def nothing() -> None:
    """Does nothing."""


def evaluate_batch(
    task: Task,
    noise: jax.Array,
    devices: Devices,
    options: Options,
    variables: Variables,
    carry: Any,
    index: int,
    batch: Batch,
) -> tuple[Any, Metrics]:
    """The carry after a batch (None unless `continued`) and its metrics, on every device."""
    key = devices.fold_in(jax.random.fold_in(noise, index), options.split)
    inputs = task.inputs(batch, carry)
    if options.adapt is not None:
        variables = options.adapt(variables, inputs)
    outputs, _ = task.model.apply(
        variables,
        *inputs,
        use_running_average=options.use_running_average,
        rngs={"noise": key},
        mutable=["batch_stats"],  # batch statistics require it; the new averages are dropped
        **({"return_carry": True} if options.continued else {}),
    )
    carry, outputs = outputs if options.continued else (None, outputs)
    return carry, devices.total(task.metrics(outputs, batch), options.split)


def make_evaluator(task: Task, noise: jax.Array, devices: Devices = ONE_DEVICE) -> Evaluator:
    """Makes a function that evaluates a split and returns the average of each metric.

    Its arguments are variables, reading, split, batch size and `use_running_average`. With a
    `title` it shows a progress bar; before each batch it calls `check`. For `adapt` see `Options`.
    All predictions have equal weight, also in a short last batch. With batch statistics or `adapt`,
    a last batch of one example is left out. The key `noise` is for noise on initial hidden states:
    each batch has its own noise, the same in every evaluation.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def run(
        options: Options, variables: Variables, carry: Any, index: int, batch: Batch
    ) -> tuple[Any, Metrics]:
        function = functools.partial(evaluate_batch, task, noise, devices, options)
        return devices.run(function, options.split, task.shared)(variables, carry, index, batch)

    def evaluate(
        variables: Variables,
        reading: Reading,
        split: str,
        batch_size: int,
        use_running_average: bool,
        title: str | None = None,
        check: Check = nothing,
        adapt: Adapt | None = None,
    ) -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        examples = task.num_examples(split, reading)
        batches = task.batches(split, batch_size, reading, devices.share)
        if title:
            batches = track(batches, title, math.ceil(examples / batch_size))
        carry = None
        for index, batch in enumerate(batches):
            check()
            rows = min(batch_size, examples - index * batch_size)
            by_batch = adapt is not None or not use_running_average
            if rows == 1 and by_batch and "batch_stats" in variables:
                continue
            options = Options(use_running_average, reading.continued, devices.splits(rows), adapt)
            batch = devices.place(batch, options.split, task.shared)
            carry, metrics = run(options, variables, carry, index, batch)
            for name, sum_and_count in metrics.items():
                sums[name] = sums.get(name, 0) + np.asarray(sum_and_count, np.float64)
        return {name: float(total / count) for name, (total, count) in sums.items()}

    return evaluate


def contribute(
    contribution: Callable,
    devices: Devices,
    split: bool,
    variables: Variables,
    rngs: dict[str, jax.Array],
    index: int,
    batch: Batch,
) -> Any:
    """A batch's contribution to population statistics; each device has its own noise if `split`."""
    own = {name: devices.fold_in(key, split) for name, key in rngs.items()}
    return contribution(variables, own, index, batch)


def population_statistics(
    task: Task,
    config: ConfigDict,
    variables: Variables,
    noise: jax.Array,
    devices: Devices = ONE_DEVICE,
    check: Check = nothing,
) -> Variables:
    """The collection `batch_stats`, re-estimated over one pass of the training data.

    Averages over full batches of `config.population_batch_size` examples, at most
    `config.population_batches` of them. Examples after the last full batch are not used; if there
    is no full batch, one batch has all examples. Moments are of the whole batch even if devices
    share it. Calls `check` before each batch.
    """
    size, reading = config.population_batch_size, task.readings[0]
    examples = task.num_examples("train", reading)
    whole = max(1, examples // size)
    whole = min(whole, config.population_batches or whole)
    devices = devices.in_one_group()
    split = devices.splits(min(size, examples))
    batches = itertools.islice(task.batches("train", size, reading, devices.share), whole)
    batches = track(batches, "re-estimating population statistics", whole)

    def placed() -> Iterator[Batch]:
        for batch in batches:
            check()
            yield devices.place(batch, split, task.shared)

    def on_devices(contribution: Callable) -> Callable:
        function = functools.partial(contribute, contribution, devices, split)
        return jax.jit(devices.run(function, split, task.shared))

    return estimate_population_statistics(
        task.model,
        variables,
        placed(),
        rngs={"noise": noise},
        late_steps=config.population_late_steps,
        inputs=task.inputs,
        transform=on_devices,
        use_running_average=False,
    )


def evaluate_all(
    task: Task,
    config: ConfigDict,
    variables: Variables,
    population: Variables | None,
    evaluate: Evaluator,
    check: Check = nothing,
) -> Iterator[dict[str, Any]]:
    """Evaluates all splits of all readings with each kind of statistics that applies.

    `evaluate` is from `make_evaluator(task, ...)`. Each reading is evaluated with `population`
    statistics. A reading that is not `continued` is also evaluated with batch statistics and, if it
    has validation's length, with running averages. If the task has `batch_inputs`, validation's
    reading is also evaluated with it. Without `population`, each reading is evaluated once.

    Batches have `config.eval_batch_size` examples. Validation's reading has batches of
    `config.batch_size` with batch statistics and with `batch_inputs`.

    Yields:
      Rows with `split`, `statistics`, the name of the `reading` if it has one, and the metrics.
    """
    first = task.readings[0]
    whole = [reading for reading in task.readings if not reading.continued]
    of_validation = [reading for reading in whole if reading.length == first.length]
    if population is None:
        plan = [("none", variables, reading) for reading in task.readings]
    else:
        estimated = {**variables, "batch_stats": population}
        plan = [
            *(("batch", variables, reading) for reading in whole),
            *(("running", variables, reading) for reading in of_validation),
            *(("population", estimated, reading) for reading in task.readings),
        ]
        if task.batch_inputs is not None:
            plan.append((BATCH_INPUTS, estimated, first))
    for statistics, values, reading in plan:
        by_batch = statistics in ("batch", BATCH_INPUTS)
        field = batch_size_field(task, reading) if by_batch else "eval_batch_size"
        size = 1 if reading.continued else config[field]
        adapt = task.batch_inputs if statistics == BATCH_INPUTS else None
        for split in reading.splits:
            row = reading.row(split, statistics)
            title = f"evaluating {describe(row)}, {task.data}"
            running = statistics != "batch"
            yield row | evaluate(values, reading, split, size, running, title, check, adapt)
