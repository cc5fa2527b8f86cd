"""Tasks: a model, its batches and its loss. The training loop uses only the interface `Task`.

To add a task, add a module here; `config.task` names it. The module has a class
`Task(config, devices)`, which inherits from `Task` below, and a function `check(config)`, which
refuses invalid values. `sequential_images.py` is the smallest task.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments.config import check_batch_sizes, check_rows, has_batch_statistics
from experiments.parallel import ONE_DEVICE, Devices
from experiments.runtime.checks import one_of
from experiments.runtime.errors import UserError

Batch = Mapping[str, Any]
# Each metric's sum over examples or predictions, and their number. Averages over batches are exact.
Metrics = dict[str, tuple[Array, Array]]
# Maps the variables and the model's positional arguments to the variables for one call.
Adapt = Callable[[dict[str, Any], tuple[Any, ...]], dict[str, Any]]
# Maps the number of rows of a batch to the rows that this process reads.
Share = Callable[[int], slice]


def all_rows(rows: int) -> slice:
    """All rows: the share of a single process."""
    return slice(rows)


class Reading(NamedTuple):
    """A way to read splits in evaluation.

    Attributes:
      splits: the splits that are read this way.
      name: its name in results, such as `segments of 100`; empty if there is only one way.
      length: time steps of an example, if the task has no fixed number.
      continued: examples are consecutive pieces of one sequence, read one by one. Each starts from
        the carry of the one before, which the model returns when called with `return_carry`.
    """

    splits: tuple[str, ...]
    name: str = ""
    length: int | None = None
    continued: bool = False

    def row(self, split: str, statistics: str) -> dict[str, str]:
        """The columns that identify an evaluation in results."""
        row = {"split": split, "statistics": statistics}
        return row | {"reading": self.name} if self.name else row


class Task(Protocol):
    """The interface of a task to training and evaluation. Each task's class inherits from it.

    Attributes:
      model: maps `(*inputs(batch), use_running_average)` to outputs.
      implementation: the implementation of its recurrence.
      data: name of the data in results.
      readings: ways of evaluation. The first is for validation; its first split chooses the best
        checkpoint.
      selection: the metric that chooses the best checkpoint.
      lower_is_better: whether a lower value of `selection` is better.
      shown: the metrics in tables; figures show the first.
      record: facts that are saved with the run, in JSON types.
      notes: lines about the data that a run prints when it starts.
      shared: entries of a batch that belong to all its rows; others have one row for each example.
      batch_inputs: replaces the population statistics of input terms by batch statistics, for one
        more row of the final evaluation; None if there is no such row. Runs under `jax.jit`.
    """

    model: nn.Module
    implementation: str
    data: str
    readings: tuple[Reading, ...] = (Reading(splits=("valid", "test")),)
    selection: str
    lower_is_better: bool
    shown: tuple[str, ...]
    record: dict[str, Any]
    notes: Sequence[str] = ()
    shared: Collection[str] = ()
    batch_inputs: Adapt | None = None

    def train_indices(self, update: int) -> np.ndarray:
        """The examples of update 0, 1, ...: a pure function of the config's seed and `update`."""

    def train_batch(self, update: int, share: Share = all_rows) -> Batch:
        """A share of the batch of an update, whose examples are `train_indices(update)`."""

    def num_examples(self, split: str, reading: Reading) -> int:
        """Number of examples of a split, including `train`."""

    def batches(
        self, split: str, batch_size: int, reading: Reading, share: Share = all_rows
    ) -> Iterator[Batch]:
        """Shares of the batches of one pass over a split; the last may be short.

        Examples come in `evaluation_order`, the pieces of a `continued` reading in sequence.
        """

    def inputs(self, batch: Batch, carry: Any = None) -> tuple[Any, ...]:
        """The model's positional arguments, with `carry` after a sequence's first piece.

        Runs under `jax.jit`.
        """

    def metrics(self, outputs: Array, batch: Batch) -> Metrics:
        """Metrics of a batch, including `loss`, which training minimises. Runs under `jax.jit`."""


def module(config: ConfigDict) -> ModuleType:
    """The module of this package that `config.task` names.

    Raises:
      UserError: there is no such module.
    """
    names = tuple(found.name for found in pkgutil.iter_modules(__path__))
    one_of("config.task", config.task, names)
    return importlib.import_module(f"{__name__}.{config.task}")


def load(config: ConfigDict, devices: Devices = ONE_DEVICE) -> Task:
    """The task that `config.task` names, with its data, on these devices.

    Raises:
      UserError: there is no such task, or it cannot run with this config or data.
    """
    task = module(config).Task(config, devices)
    task.notes = [*task.notes, *check_evaluation(task, config)]
    return task


def check_batch_size(config: ConfigDict, num_examples: int, data: str) -> None:
    """Refuses batches that are larger than the training data, or too small for batch statistics.

    Raises:
      UserError: names the field.
    """
    size = config.batch_size
    if size > num_examples:
        raise UserError(
            f"config.batch_size is {size}: it must be at most {num_examples}, the number of "
            f"training examples of {data}"
        )
    check_batch_sizes(config)


def batch_size_field(task: Task, reading: Reading) -> str:
    """The config field that sets the batch size of a reading with batch statistics."""
    return "batch_size" if reading == task.readings[0] else "eval_batch_size"


def check_evaluation(task: Task, config: ConfigDict) -> list[str]:
    """Refuses evaluation batches of one example if a model uses batch statistics.

    Returns:
      Notes on splits whose last batch has one example.

    Raises:
      UserError: names the field, or the split that has only one example.
    """
    if not has_batch_statistics(config):
        return []
    notes = []
    for reading in task.readings:
        if reading.continued:
            continue
        field = batch_size_field(task, reading)
        check_rows(config, config[field], f"config.{field} is {config[field]}")
        for split in reading.splits:
            count = task.num_examples(split, reading)
            examples = f"{split} {reading.name or 'examples'}"
            check_rows(config, count, f"the number of {examples} is {count}")
            if count % config[field] == 1:
                notes.append(
                    f"the last batch of the {count:,} {examples} has one example; evaluation with "
                    f"batch statistics leaves it out (config.{field})"
                )
    return notes


def updates_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of batches of an epoch. The last one may be short, as in the paper's experiments.

    A last batch of one example has no batch statistics and is left out.
    """
    whole, rest = divmod(num_examples, batch_size)
    return whole + (rest > 1)


def shuffled_batch(num_examples: int, batch_size: int, seed: int, update: int) -> np.ndarray:
    """Indices of the examples of an update; each epoch has its own random order."""
    epoch, number = divmod(update, updates_per_epoch(num_examples, batch_size))
    order = epoch_order(num_examples, seed, epoch)
    return order[number * batch_size : (number + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Examples in the order of an epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    order.flags.writeable = False  # the cached array serves later updates
    return order


@functools.lru_cache
def evaluation_order(num_examples: int) -> np.ndarray:
    """The order in which examples of a split are evaluated: random, but always the same.

    Evaluation batches then have similar statistics to training batches. In file order they would
    not: neighbours are alike, such as digits of one writer or segments of one article.
    """
    order = np.random.default_rng(0).permutation(num_examples)
    order.flags.writeable = False  # the cached array serves later evaluations
    return order


def in_batches(examples: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Pieces of `batch_size` examples, in order; the last may be short."""
    for first in range(0, len(examples), batch_size):
        yield examples[first : first + batch_size]
