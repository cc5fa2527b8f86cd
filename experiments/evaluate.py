"""Evaluation: with the batch's statistics, with running averages, with population statistics."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bnlstm_jax import estimate_population_statistics
from experiments.metrics import describe, track
from experiments.tasks import Batch, Metrics, Reading, Task

Variables = dict[str, Any]
Evaluator = Callable[..., dict[str, float]]


def make_evaluator(task: Task, noise: jax.Array) -> Evaluator:
    """A function of variables, reading, split, batch size and `use_running_average`: averages.

    With a `title` it shows a progress bar. Every example counts the same, also those of a short
    last batch. The key `noise` feeds noise on initial hidden states, which is drawn anew for each
    batch and the same in each evaluation.
    """

    @jax.jit(static_argnames=("use_running_average", "continued"))
    def run(
        variables: Variables,
        batch: Batch,
        carry: Any,
        index: int,
        use_running_average: bool,
        continued: bool,
    ) -> tuple[Any, Metrics]:
        outputs, _ = task.model.apply(
            variables,
            *task.inputs(batch, carry),
            use_running_average=use_running_average,
            rngs={"noise": jax.random.fold_in(noise, index)},
            mutable=["batch_stats"],  # so that batch statistics may be taken; they are dropped
            **({"return_carry": True} if continued else {}),
        )
        carry, outputs = outputs if continued else (None, outputs)
        return carry, task.metrics(outputs, batch)

    def evaluate(
        variables: Variables,
        reading: Reading,
        split: str,
        batch_size: int,
        use_running_average: bool,
        title: str | None = None,
    ) -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        batches = task.batches(split, batch_size, reading)
        if title:
            examples = task.num_examples(split, reading)
            batches = track(batches, title, math.ceil(examples / batch_size))
        carry = None
        for index, batch in enumerate(batches):
            carry, metrics = run(
                variables, batch, carry, index, use_running_average, reading.continued
            )
            for name, sum_and_count in metrics.items():
                sums[name] = sums.get(name, 0) + np.asarray(sum_and_count, np.float64)
        return {name: float(total / count) for name, (total, count) in sums.items()}

    return evaluate


def population_statistics(
    task: Task, config: ConfigDict, variables: Variables, noise: jax.Array
) -> Variables:
    """The collection `batch_stats`, re-estimated over one pass of the training data.

    Whole batches of `config.population_batch_size` are averaged with equal weight, at most
    `config.population_batches` of them; what is left over after the last whole one is not used.
    """
    size, reading = config.population_batch_size, task.readings[0]
    whole = max(1, task.num_examples("train", reading) // size)
    whole = min(whole, config.population_batches or whole)
    batches = itertools.islice(task.batches("train", size, reading), whole)
    return estimate_population_statistics(
        task.model,
        variables,
        map(task.inputs, track(batches, "re-estimating population statistics", whole)),
        rngs={"noise": noise},
        late_steps=config.population_late_steps,
        use_running_average=False,
    )


def evaluate_all(
    task: Task,
    config: ConfigDict,
    variables: Variables,
    population: Variables | None,
    evaluate: Evaluator,
) -> Iterator[dict[str, Any]]:
    """Every split, read and normalised in every way, through `make_evaluator(task, ...)`.

    Validation's reading is evaluated with batch statistics (in batches of `config.batch_size`),
    with running averages and with `population` statistics; the others with batch statistics, where
    there is a batch, and with population statistics.

    Yields:
      Rows with `split`, `statistics`, the name of the `reading` where it has one, and the metrics.
    """
    first = task.readings[0]

    def rows(statistics: str, values: Variables, reading: Reading) -> Iterator[dict[str, Any]]:
        size = config.eval_batch_size
        if reading.continued:
            size = 1
        elif statistics == "batch" and reading == first:
            size = config.batch_size
        for split in reading.splits:
            row = reading.row(split, statistics)
            title = f"evaluating {describe(row)}, {task.data}"
            yield row | evaluate(values, reading, split, size, statistics != "batch", title)

    if population is None:
        for reading in task.readings:
            yield from rows("none", variables, reading)
        return
    for reading in task.readings:
        if not reading.continued:
            yield from rows("batch", variables, reading)
    yield from rows("running", variables, first)
    for reading in task.readings:
        yield from rows("population", {**variables, "batch_stats": population}, reading)
