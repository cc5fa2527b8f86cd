"""Evaluation: with the batch's statistics, with running averages, with population statistics."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bnlstm_jax import estimate_population_statistics
from experiments.tasks import Batch, Metrics, Task

# How each kind of evaluation normalises, as it is named wherever its numbers stand.
STATISTICS = {
    "batch": "batch statistics",
    "running": "population statistics, running average",
    "population": "population statistics, re-estimated",
    "none": "no normalisation",
}

Variables = dict[str, Any]
Evaluator = Callable[[Variables, str, int, bool], dict[str, float]]


def make_evaluator(task: Task, noise: jax.Array) -> Evaluator:
    """A function of variables, split, batch size and `use_running_average` that gives averages.

    Every example counts the same, also those of a short last batch. The key `noise` feeds noise
    on initial hidden states, which is drawn anew for each batch and the same in each evaluation.
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
        variables: Variables, split: str, batch_size: int, use_running_average: bool
    ) -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        for index, batch in enumerate(task.batches(split, batch_size)):
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

    def whole_batches():
        for number, batch in enumerate(task.batches("train", size)):
            if number == 0 or len(jax.tree.leaves(batch)[0]) == size:
                yield task.inputs(batch)

    statistics = estimate_population_statistics(
        task.model, variables, whole_batches(), rngs={"noise": noise}, use_running_average=False
    )
    return {**variables, "batch_stats": statistics}


def evaluate_all(
    task: Task, config: ConfigDict, variables: Variables, noise: jax.Array
) -> list[dict[str, Any]]:
    """Every split, evaluated in every way: rows with `split`, `statistics`, and the metrics."""
    evaluate = make_evaluator(task, noise)
    if "batch_stats" in variables:
        population = population_variables(task, config, variables, noise)
        ways = [
            ("batch", variables, config.batch_size, False),
            ("running", variables, config.eval_batch_size, True),
            ("population", population, config.eval_batch_size, True),
        ]
    else:
        ways = [("none", variables, config.eval_batch_size, True)]
    return [
        {"split": split, "statistics": name, **evaluate(values, split, batch_size, running)}
        for name, values, batch_size, running in ways
        for split in task.splits
    ]
