"""Evaluation: with the batch's statistics, with running averages, with population statistics."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bnlstm_jax import estimate_population_statistics
from experiments.metrics import STATISTICS, track
from experiments.tasks import Batch, Metrics, Task

Variables = dict[str, Any]
Evaluator = Callable[..., dict[str, float]]


def make_evaluator(task: Task, noise: jax.Array) -> Evaluator:
    """A function of variables, split, batch size and `use_running_average` that gives averages.

    With a `title` it shows a progress bar. Every example counts the same, also those of a short
    last batch. The key `noise` feeds noise on initial hidden states, which is drawn anew for each
    batch and the same in each evaluation.
    """

    @jax.jit(static_argnames="use_running_average")
    def metrics_of(
        variables: Variables, batch: Batch, index: int, use_running_average: bool
    ) -> Metrics:
        outputs, _ = task.model.apply(
            variables,
            *task.inputs(batch),
            use_running_average=use_running_average,
            rngs={"noise": jax.random.fold_in(noise, index)},
            mutable=["batch_stats"],  # so that batch statistics may be taken; they are dropped
        )
        return task.metrics(outputs, batch)

    def evaluate(
        variables: Variables,
        split: str,
        batch_size: int,
        use_running_average: bool,
        title: str | None = None,
    ) -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        batches = task.batches(split, batch_size)
        if title:
            batches = track(batches, title, math.ceil(task.num_examples(split) / batch_size))
        for index, batch in enumerate(batches):
            metrics = metrics_of(variables, batch, index, use_running_average)
            for name, sum_and_count in metrics.items():
                sums[name] = sums.get(name, 0) + np.asarray(sum_and_count, np.float64)
        return {name: float(total / count) for name, (total, count) in sums.items()}

    return evaluate


def population_variables(
    task: Task, config: ConfigDict, variables: Variables, noise: jax.Array
) -> Variables:
    """`variables` with statistics re-estimated over one pass of the training data.

    Whole batches of `config.population_batch_size` are averaged with equal weight; what is left
    over after the last whole one is not used.
    """
    size = config.population_batch_size
    whole = max(1, task.num_examples("train") // size)
    batches = itertools.islice(task.batches("train", size), whole)
    statistics = estimate_population_statistics(
        task.model,
        variables,
        map(task.inputs, track(batches, "re-estimating population statistics", whole)),
        rngs={"noise": noise},
        use_running_average=False,
    )
    return {**variables, "batch_stats": statistics}


def evaluate_all(
    task: Task, config: ConfigDict, variables: Variables, noise: jax.Array
) -> Iterator[dict[str, Any]]:
    """Every split, evaluated in every way: rows with `split`, `statistics`, and the metrics."""
    evaluate = make_evaluator(task, noise)

    def rows(values: Variables, statistics: str, batch_size: int) -> Iterator[dict[str, Any]]:
        for split in task.splits:
            title = f"evaluating {split} ({STATISTICS[statistics]})"
            metrics = evaluate(values, split, batch_size, statistics != "batch", title)
            yield {"split": split, "statistics": statistics, **metrics}

    if "batch_stats" not in variables:
        yield from rows(variables, "none", config.eval_batch_size)
        return
    yield from rows(variables, "batch", config.batch_size)
    yield from rows(variables, "running", config.eval_batch_size)
    variables = population_variables(task, config, variables, noise)
    yield from rows(variables, "population", config.eval_batch_size)
