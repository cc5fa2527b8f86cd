"""Character-level language models: predict each character of a text from the characters before."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from ml_collections import ConfigDict

from experiments import tasks
from experiments.config import base_config, check_fields, has_batch_statistics
from experiments.datasets import corpus
from experiments.datasets.corpus import SPLITS
from experiments.models import layers
from experiments.models.language_model import LanguageModel
from experiments.models.layers import layer_config, recurrent_layer
from experiments.parallel import ONE_DEVICE, Devices
from experiments.runtime.checks import one_of, words
from experiments.runtime.errors import UserError
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
    updates_per_epoch,
)

SELECTIONS = ("accuracy", "bits_per_character")


def text_config(config: ConfigDict) -> ConfigDict:
    """Adds the fields of this task to those that all share."""
    layer_config(config)
    config.task = "char_lm"
    config.dataset = "text"  # or ptb, text8
    config.text_file = ""  # UTF-8, for the data set `text`
    # Sizes of training, validation and test text, in this order from the start of the text: numbers
    # of characters, or fractions. Empty for ptb, which comes split.
    config.split = (0.9, 0.05, 0.05)
    config.segment_length = 100  # in characters; one more than its predictions
    config.selection = "bits_per_character"  # or accuracy; chooses the best checkpoint
    # Evaluation beyond segments of `segment_length`.
    config.eval_lengths = ()  # other segment lengths, on the test text
    config.whole_text = ("test",)  # splits that are read as one sequence
    config.chunk_length = 1000  # predictions in each piece of such a split; no effect on results
    return config


def make_model(config: ConfigDict, vocab_size: int, axis_name: str | None = None) -> LanguageModel:
    """The model of a config, for texts of `vocab_size` symbols."""
    layer = recurrent_layer(config.model, config.segment_length - 1, vocab_size, axis_name)
    return LanguageModel(layer, config.model.dtype)


class Task(tasks.Task):
    """Predicts the next character of a corpus; see `experiments.tasks.Task`.

    The text is on the device. A batch holds the starts of its segments, and the device gathers
    their symbols.
    """

    shown = ("bits_per_character", "accuracy")
    shared = ("text", "steps")

    def __init__(self, config: ConfigDict, devices: Devices = ONE_DEVICE) -> None:
        """Loads the corpus `config.dataset`."""
        check(config)
        data = corpus.load(config.dataset, config.data_dir, config.text_file, config.split)
        self.config = config
        self.data = data.name
        self.selection = config.selection
        self.lower_is_better = config.selection == "bits_per_character"
        self.readings = make_readings(config)
        self.sizes = {split: len(data.splits[split]) for split in SPLITS}
        self.num_segments = self.sizes["train"] // config.segment_length - 1  # at any offset
        self._check_sizes()
        self._tell_unknown(data)
        self.model = make_model(config, len(data.vocabulary), devices.statistics_axis)
        self.implementation = layers.implementation_of(self.model.layer, config.batch_size)
        self.text = {split: devices.replicate(data.splits[split]) for split in SPLITS}
        self.record: dict[str, Any] = {
            "dataset": data.name,
            "vocabulary": data.vocabulary,
            "dataset_sha256": data.digest,
            "characters": self.sizes,
        }

    def train_indices(self, update: int) -> np.ndarray:
        """The segments of an update."""
        config = self.config
        return shuffled_batch(self.num_segments, config.batch_size, config.seed, update)

    def train_batch(self, update: int, share: Share = all_rows) -> Batch:
        """Segments of an update. Each epoch cuts the text from another random offset on."""
        length, seed = self.config.segment_length, self.config.seed
        epoch = update // updates_per_epoch(self.num_segments, self.config.batch_size)
        offset = np.random.default_rng([seed, epoch, 1]).integers(length)
        indices = self.train_indices(update)
        indices = indices[share(len(indices))]
        return self._segments("train", offset + length * indices, length)

    def num_examples(self, split: str, reading: Reading) -> int:
        """Number of segments of a split, or of pieces of the whole text."""
        if reading.continued:
            return math.ceil((self.sizes[split] - 1) / reading.length)
        return self.sizes[split] // reading.length

    def batches(
        self, split: str, batch_size: int, reading: Reading, share: Share = all_rows
    ) -> Iterator[Batch]:
        """Segments of a split in `evaluation_order`, or pieces of the whole text, one by one."""
        if reading.continued:
            for start in range(0, self.sizes[split] - 1, reading.length):
                end = min(start + reading.length + 1, self.sizes[split])
                yield self._segments(split, np.array([start]), end - start)
            return
        starts = reading.length * evaluation_order(self.num_examples(split, reading))
        for batch in in_batches(starts, batch_size):
            yield self._segments(split, batch[share(len(batch))], reading.length)

    def _segments(self, split: str, starts: np.ndarray, length: int) -> Batch:
        steps = np.arange(length, dtype=np.int32)
        return {"text": self.text[split], "start": starts.astype(np.int32), "steps": steps}

    def inputs(self, batch: Batch, carry: Any = None) -> tuple[Any, ...]:
        """Symbols of each segment except its last, `[batch, time]`.

        With `carry`, also the carry and the first step.
        """
        symbols = gather(batch)[:, :-1]
        return (symbols,) if carry is None else (symbols, carry, batch["start"][0])

    def metrics(self, outputs: Array, batch: Batch) -> Metrics:
        """Cross-entropy in nats and in bits, and accuracy, of logits `[batch, time, V]`."""
        targets = gather(batch)[:, 1:]
        count = jnp.float32(targets.size)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], axis=-1)
        nats = -jnp.sum(log_p)
        correct = jnp.sum(outputs.argmax(-1) == targets, dtype=jnp.float32)
        return {
            "loss": (nats, count),
            "bits_per_character": (nats / math.log(2), count),
            "accuracy": (correct, count),
        }

    def _tell_unknown(self, data: corpus.Corpus) -> None:
        """Warns of characters that the training text lacks."""
        for split, share in data.unknown.items():
            if share:
                logging.warning(
                    "%.3f%% of the %s text of %s are characters that the training text lacks; "
                    "they count as one symbol, U+FFFD",
                    100 * share,
                    split,
                    self.data,
                )

    def _check_sizes(self) -> None:
        """Refuses texts that are too short for the config."""
        length, batch_size = self.config.segment_length, self.config.batch_size
        for split, size in self.sizes.items():
            least = 2 * length if split == "train" else length  # in training there is an offset
            if size > np.iinfo(np.int32).max:
                raise UserError(
                    f"the {split} text of {self.data} has {size:,} characters: it must have fewer "
                    "than 2^31; reduce config.split"
                )
            if size < least:
                raise UserError(
                    f"config.segment_length is {length}, and the {split} text of {self.data} has "
                    f"{size:,} characters: it must have at least {least:,}; use shorter segments "
                    "or more text"
                )
        check_batch_size(self.config, self.num_segments, self.data)
        validated = self.sizes["valid"] // length
        if has_batch_statistics(self.config) and validated < batch_size:
            logging.warning(
                "The validation text of %s has %d segments, fewer than a batch: batch statistics, "
                "and so the choice of the best checkpoint, are noisy",
                self.data,
                validated,
            )
        for reading in self.readings:
            size = min(self.sizes[split] for split in reading.splits)
            if not reading.continued and reading.length > size:
                raise UserError(
                    f"config.eval_lengths has {reading.length}: it must be at most {size:,}, the "
                    "number of characters of the test text"
                )


def gather(batch: Batch) -> Array:
    """The symbols of a batch's segments, int32 `[batch, length]`. Runs under `jax.jit`."""
    return batch["text"][batch["start"][:, None] + batch["steps"]].astype(jnp.int32)


def make_readings(config: ConfigDict) -> tuple[Reading, ...]:
    """Segments as in training, segments of other lengths, and the whole text as one sequence.

    Only validation uses batches of training's size.
    """

    def segments(splits: tuple[str, ...], length: int) -> Reading:
        return Reading(splits, f"segments of {length}", length)

    readings = [segments(("valid",), config.segment_length)]
    lengths = dict.fromkeys((config.segment_length, *config.eval_lengths))
    readings += [segments(("test",), n) for n in lengths]
    if words(config.whole_text):
        whole = tuple(dict.fromkeys(words(config.whole_text)))
        readings.append(Reading(whole, "one sequence", config.chunk_length, continued=True))
    return tuple(readings)


def check(config: ConfigDict) -> None:
    """Refuses values that this task cannot run with.

    Raises:
      UserError: names the field and what it may be.
    """
    check_fields(config, text_config(base_config()))
    layers.check(config.model)
    corpus.check(config.dataset, config.text_file, config.split)
    one_of("config.selection", config.selection, SELECTIONS)
    for split in words(config.whole_text):
        one_of("config.whole_text", split, SPLITS)
    # A segment needs two characters for one prediction; `chunk_length` counts predictions.
    lengths = [("segment_length", config.segment_length, 2)]
    lengths += [("eval_lengths", length, 2) for length in config.eval_lengths]
    lengths += [("chunk_length", config.chunk_length, 1)]
    for name, length, least in lengths:
        if not isinstance(length, int) or length < least:
            raise UserError(
                f"config.{name} is {length!r}: it must be a whole number, at least {least}"
            )
