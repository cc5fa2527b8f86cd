"""Tasks: what the training loop must be told to train on something. One module each.

The loop knows a task by the interface `Task` and by nothing else.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import flax.linen as nn
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments.errors import UserError, unknown_name

Batch = Mapping[str, np.ndarray]
# Sums over examples or predictions, and their number, so that averages over batches are exact.
Metrics = dict[str, tuple[Array, Array]]


class Task(Protocol):
    """What a task module's class `Task(config)` offers.

    Attributes:
      model: maps `(*inputs(batch), use_running_average)` to outputs.
      selection: the metric people look at; on validation data it chooses the best checkpoint.
      lower_is_better: which way `selection` goes.
      splits: the splits that are evaluated, the one that selects first.
      record: facts that are saved beside the run, in JSON types.
    """

    model: nn.Module
    selection: str
    lower_is_better: bool
    splits: tuple[str, ...]
    record: dict[str, Any]

    def train_batch(self, update: int) -> Batch:
        """The batch of update 0, 1, ...: a pure function of the config's seed and `update`."""

    def num_examples(self, split: str) -> int:
        """Number of examples of a split, the training split `train` among them."""

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """One pass over a split, in order; the last batch may be short."""

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """What the model is called with. Traced: jax operations only."""

    def metrics(self, outputs: Array, batch: Batch) -> Metrics:
        """Metrics of a batch, `loss` among them, which training minimises. Traced."""


def load(config: ConfigDict) -> Task:
    """The task that `config.task` names, with its data.

    Raises:
      UserError: there is no such task, or the config or its data won't do.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if config.task not in names:
        raise UserError(unknown_name("config.task", config.task, names))
    return importlib.import_module(f"{__name__}.{config.task}").Task(config)


def shuffled_batch(num_examples: int, batch_size: int, seed: int, update: int) -> np.ndarray:
    """Indices of the examples of an update: every epoch in an order of its own, none left out.

    The last batch of an epoch holds what is left, as in the paper's experiments.
    """
    per_epoch = -(-num_examples // batch_size)
    epoch, number = divmod(update, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[number * batch_size : (number + 1) * batch_size]
