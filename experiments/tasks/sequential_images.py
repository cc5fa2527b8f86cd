"""Classification of images that are read one pixel per time step, such as sequential MNIST."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments import datasets, tasks
from experiments.config import MAX_SEED, base_config, check_fields
from experiments.models import layers
from experiments.models.layers import layer_config, recurrent_layer
from experiments.models.sequence_classifier import SequenceClassifier
from experiments.parallel import ONE_DEVICE, Devices
from experiments.runtime.checks import at_least, at_most, one_of
from experiments.tasks import (
    Batch,
    Metrics,
    Reading,
    Share,
    all_rows,
    check_batch_size,
    evaluation_order,
    in_batches,
    shuffled_batch,
)

DATASETS = ("digits", "mnist")
PIXEL_ORDERS = ("in_order", "permutation", "released_draw")


def image_config(config: ConfigDict) -> ConfigDict:
    """Adds the fields of this task to those that all share."""
    layer_config(config)
    config.task = "sequential_images"
    config.dataset = "mnist"  # or digits
    config.pixel_order = "in_order"  # or permutation, released_draw; see `pixel_order`
    config.pixel_order_seed = 1
    return config


def pixel_order(name: str, pixels: int, seed: int) -> np.ndarray:
    """Which pixel is read at each time step, `[pixels]`.

    Args:
      name: `in_order`, row by row; `permutation`, every pixel once, in a random order;
        `released_draw`, as in the paper's released code: draws with replacement, so that for 784
        pixels and seed 1 only 501 pixels are read, some several times.
      pixels: number of pixels.
      seed: of the random order.
    """
    random = np.random.RandomState(seed)  # NumPy never changes RandomState's streams
    if name == "permutation":
        return random.permutation(pixels)
    if name == "released_draw":
        return random.randint(0, pixels, pixels)
    return np.arange(pixels)


class Task(tasks.Task):
    """Classifies sequences of pixels in [0, 1], one per time step; see `experiments.tasks.Task`."""

    selection = "accuracy"
    lower_is_better = False
    shown = ("accuracy", "loss")

    def __init__(self, config: ConfigDict, devices: Devices = ONE_DEVICE) -> None:
        """Loads `config.dataset` from `config.data_dir`."""
        check(config)
        data = datasets.load(config.dataset, config.data_dir)
        self.config = config
        self.data = config.dataset
        self.max_pixel = data.info["max_pixel"]
        pixels = data.arrays["train_images"].shape[1]
        order = pixel_order(config.pixel_order, pixels, config.pixel_order_seed)
        splits = ("train", "valid", "test")
        self.images = {split: data.arrays[f"{split}_images"][:, order] for split in splits}
        self.labels = {split: data.arrays[f"{split}_labels"] for split in splits}
        check_batch_size(config, len(self.labels["train"]), self.data)
        layer = recurrent_layer(config.model, pixels, axis_name=devices.statistics_axis)
        self.implementation = layers.implementation_of(layer, config.batch_size)
        self.model = SequenceClassifier(layer, data.info["num_classes"], dtype=config.model.dtype)
        self.record: dict[str, Any] = {
            "dataset": config.dataset,
            "dataset_sha256": data.digest,
            "examples": {split: len(labels) for split, labels in self.labels.items()},
            "pixel_order": order.tolist(),
        }

    def train_indices(self, update: int) -> np.ndarray:
        """The images of an update."""
        config = self.config
        return shuffled_batch(len(self.labels["train"]), config.batch_size, config.seed, update)

    def train_batch(self, update: int, share: Share = all_rows) -> Batch:
        """Images `[batch, time]` in uint8 and labels `[batch]` of an update."""
        indices = self.train_indices(update)
        return self._batch("train", indices[share(len(indices))])

    def num_examples(self, split: str, reading: Reading) -> int:
        """Number of images of a split."""
        return len(self.labels[split])

    def batches(
        self, split: str, batch_size: int, reading: Reading, share: Share = all_rows
    ) -> Iterator[Batch]:
        """One pass over a split, in `evaluation_order`."""
        order = evaluation_order(self.num_examples(split, reading))
        for indices in in_batches(order, batch_size):
            yield self._batch(split, indices[share(len(indices))])

    def _batch(self, split: str, which: np.ndarray) -> Batch:
        return {"image": self.images[split][which], "label": self.labels[split][which]}

    def inputs(self, batch: Batch, carry: Any = None) -> tuple[Array, ...]:
        """Pixels in [0, 1], `[batch, time, 1]`."""
        return (jnp.asarray(batch["image"], jnp.float32)[..., None] / self.max_pixel,)

    def metrics(self, outputs: Array, batch: Batch) -> Metrics:
        """Cross-entropy in nats and accuracy, from logits `[batch, classes]`."""
        labels = jnp.asarray(batch["label"], jnp.int32)
        count = jnp.float32(len(labels))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], axis=-1)
        correct = jnp.sum(outputs.argmax(-1) == labels, dtype=jnp.float32)
        return {
            "loss": (-jnp.sum(log_p), count),
            "accuracy": (correct, count),
        }


def check(config: ConfigDict) -> None:
    """Refuses values that this task cannot run with.

    Raises:
      UserError: names the field and what it may be.
    """
    check_fields(config, image_config(base_config()))
    layers.check(config.model)
    one_of("config.dataset", config.dataset, DATASETS)
    one_of("config.pixel_order", config.pixel_order, PIXEL_ORDERS)
    at_least("config.pixel_order_seed", config.pixel_order_seed, 0)
    at_most("config.pixel_order_seed", config.pixel_order_seed, MAX_SEED)
