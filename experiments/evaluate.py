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
from experiments.parallel import ONE_DEVICE, BatchSharding, Devices
from experiments.records.metrics import describe
from experiments.runtime.progress import track
from experiments.tasks import Adapt, Batch, Metrics, Reading, Task, batch_size_field

Variables = dict[str, Any]
Check = Callable[[], None]  # called between batches; may raise
BATCH_INPUTS = "population_batch_inputs"  # see `Task.batch_inputs`
BY_BATCH = ("batch", BATCH_INPUTS)  # statistics that depend on the batch


class Options(NamedTuple):
    """How a batch is evaluated.

    Attributes:
      use_running_average: normalise by the variables' `batch_stats`, not by batch statistics.
      adapt: changes the variables for the batch, such as `Task.batch_inputs`; may be None.
      continued: the batch starts from the carry of the batch before it.
      sharding: how devices compute the batch.
    """

    use_running_average: bool
    adapt: Adapt | None
    continued: bool
    sharding: BatchSharding


def evaluate_batch(
    task: Task,
    noise: jax.Array,
    options: Options,
    variables: Variables,
    carry: Any,
    index: int,
    batch: Batch,
) -> tuple[Any, Metrics]:
    """The carry after a batch (None unless `continued`) and its metrics, on every device."""
    sharding = options.sharding
    inputs = task.inputs(batch, carry)
    if options.adapt is not None:
        variables = options.adapt(variables, inputs)
    outputs, _ = task.model.apply(
        variables,
        *inputs,
        use_running_average=options.use_running_average,
        rngs={"noise": sharding.fold_in(jax.random.fold_in(noise, index))},
        mutable=["batch_stats"],  # batch statistics require it; the new averages are dropped
        **({"return_carry": True} if options.continued else {}),
    )
    carry, outputs = outputs if options.continued else (None, outputs)
    return carry, sharding.total(task.metrics(outputs, batch))


def contribute(
    contribution: Callable,
    sharding: BatchSharding,
    variables: Variables,
    rngs: dict[str, jax.Array],
    index: int,
    batch: Batch,
) -> Any:
    """A batch's contribution to population statistics, on every device.

    Devices with their own rows have their own noise.
    """
    own = {name: sharding.fold_in(key) for name, key in rngs.items()}
    return contribution(variables, own, index, batch)


def watched(
    batches: Iterator[Batch], title: str, total: int, check: Check | None
) -> Iterator[Batch]:
    """Calls `check` before each batch and shows a progress bar; if `check` is None, neither."""
    if check is None:
        yield from batches
        return
    for batch in track(batches, title, total):
        check()
        yield batch


class Evaluator:
    """Evaluates a task's model.

    Each batch has its own noise on initial hidden states, the same in every evaluation.
    """

    def __init__(
        self, task: Task, config: ConfigDict, noise: jax.Array, devices: Devices = ONE_DEVICE
    ) -> None:
        """`noise` is the key of the noise on initial hidden states."""
        self._task = task
        self._config = config
        self._noise = noise
        self._devices = devices

        def on_devices(options: Options, *arguments: Any) -> tuple[Any, Metrics]:
            function = functools.partial(evaluate_batch, task, noise, options)
            return options.sharding.run(function)(*arguments)

        self._compiled = jax.jit(on_devices, static_argnums=0)

    def evaluate(
        self,
        variables: Variables,
        reading: Reading,
        split: str,
        statistics: str,
        batch_size: int,
        check: Check | None = None,
    ) -> dict[str, float]:
        """The average of each metric over a split.

        All predictions have equal weight, also in a short last batch. If statistics depend on the
        batch, a last batch of one example is left out.

        Args:
          variables: of the model; their `batch_stats` serve all statistics but `batch`.
          reading: how the split is read.
          split: its name.
          statistics: the statistics that normalise, a key of `metrics.STATISTICS`.
          batch_size: number of examples.
          check: called before each batch; if given, a progress bar is shown.
        """
        task = self._task
        adapt = task.batch_inputs if statistics == BATCH_INPUTS else None
        examples = task.num_examples(split, reading)
        batches = task.batches(split, batch_size, reading, self._devices.share)
        title = f"evaluating {describe(reading.row(split, statistics))}, {task.data}"
        batches = watched(batches, title, math.ceil(examples / batch_size), check)
        sums: dict[str, np.ndarray] = {}
        carry = None
        for index, batch in enumerate(batches):
            rows = min(batch_size, examples - index * batch_size)
            if rows == 1 and statistics in BY_BATCH:
                continue
            sharding = self._devices.sharding(rows, task.shared)
            options = Options(statistics != "batch", adapt, reading.continued, sharding)
            carry, metrics = self._compiled(options, variables, carry, index, sharding.place(batch))
            for name, sum_and_count in metrics.items():
                sums[name] = sums.get(name, 0) + np.asarray(sum_and_count, np.float64)
        return {name: float(total / count) for name, (total, count) in sums.items()}

    def evaluate_all(
        self, variables: Variables, population: Variables | None, check: Check | None = None
    ) -> Iterator[dict[str, Any]]:
        """Evaluates all splits of all readings with each kind of statistics that applies.

        Each reading is evaluated with `population` statistics. A reading that is not `continued` is
        also evaluated with batch statistics and, if it has validation's length, with running
        averages. If the task has `batch_inputs`, validation's reading is also evaluated with it.
        Without `population`, each reading is evaluated once. For `check` see `evaluate`.

        Batches have `config.eval_batch_size` examples. Validation's reading has batches of
        `config.batch_size` if statistics depend on the batch.

        Yields:
          Rows with `split`, `statistics`, the name of the `reading` if it has one, and the metrics.
        """
        task = self._task
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
            by_batch = statistics in BY_BATCH
            field = batch_size_field(task, reading) if by_batch else "eval_batch_size"
            size = 1 if reading.continued else self._config[field]
            for split in reading.splits:
                metrics = self.evaluate(values, reading, split, statistics, size, check)
                yield reading.row(split, statistics) | metrics

    def population_statistics(self, variables: Variables, check: Check | None = None) -> Variables:
        """The collection `batch_stats`, re-estimated over one pass of the training data.

        Averages over full batches of `config.population_batch_size` examples, at most
        `config.population_batches` of them. Examples after the last full batch are not used; if
        there is no full batch, one batch has all examples. Moments are of the whole batch even if
        devices share it. For `check` see `evaluate`.
        """
        task, config = self._task, self._config
        size, reading = config.population_batch_size, task.readings[0]
        examples = task.num_examples("train", reading)
        whole = max(1, examples // size)
        whole = min(whole, config.population_batches or whole)
        devices = self._devices.in_one_group()
        sharding = devices.sharding(min(size, examples), task.shared)
        batches = itertools.islice(task.batches("train", size, reading, devices.share), whole)
        batches = watched(batches, "re-estimating population statistics", whole, check)

        def compiled(contribution: Callable) -> Callable:
            return jax.jit(sharding.run(functools.partial(contribute, contribution, sharding)))

        return estimate_population_statistics(
            task.model,
            variables,
            map(sharding.place, batches),
            rngs={"noise": self._noise},
            late_steps=config.population_late_steps,
            inputs=task.inputs,
            transform=compiled,
            use_running_average=False,
        )
