"""Answers questions on passages by a word: the Attentive Reader on CNN news and on bAbI."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments import tasks
from experiments.config import base_config, check_fields
from experiments.datasets import questions
from experiments.datasets.question_arrays import SPLITS
from experiments.datasets.questions import SPECIALS, Selection, Split, Texts
from experiments.models.attentive_reader import (
    FORMS,
    AttentiveReader,
    Quirks,
    with_input_statistics,
)
from experiments.models.layers import check_max_steps, implementation_of
from experiments.parallel import ONE_DEVICE, Devices
from experiments.runtime.checks import at_least, at_most, one_of
from experiments.runtime.errors import UserError
from experiments.tasks import (
    Batch,
    Metrics,
    Reading,
    Share,
    all_rows,
    check_batch_size,
    epoch_order,
    evaluation_order,
    in_batches,
)

ROUNDING = 8  # passages are padded to a multiple of this many words
MAX_LENGTHS = 1000  # limit of `num_lengths`: far more programs than there is time to compile
LOSS_FLOOR = 1e-8  # added to probabilities before their logarithm, as in the released code


def reader_config(config: ConfigDict) -> ConfigDict:
    """Adds the fields of this task to those that all share."""
    config.task = "question_answering"
    # lstm, bn_lstm, bn_everywhere, bn_e_star or bn_e_star_star; several with commas
    config.model.kind = "bn_e_star_star"
    config.dataset = "cnn"  # or babi
    config.subset = ""  # of babi: qa1, qa2, qa4 or qa5
    config.min_count = 2  # rarer words in training questions become <unk>
    config.join_numbers = True  # words of digits become <num>
    config.num_sentences = 0  # sentences kept per passage, the most like the question; 0: all
    # A sentence's score, from the words that it shares with the question: their number (words), the
    # number of entities among them (entities), or their information content (rare_words). The score
    # is divided by a power of the sentence's length.
    config.sentence_rule = "words"
    config.sentence_length_power = 0.0
    config.sentence_ties = "earlier"  # or later: which of two sentences with equal scores is kept
    config.max_passage_length = 2000  # in words; longer passages are left out, and counted
    config.permute_entities = True  # in training, differently in each batch
    # Sorts the questions of this many batches by length, longest first, to save padding; 1: none.
    config.sorted_batches = 1
    config.num_lengths = 5  # number of padded passage lengths; each needs a compiled program

    config.model.square_scale = 0.05  # of square kernels, which start orthogonal
    config.model.bilinear = True  # a term of attention that Hermann et al. do not have
    config.model.mean_passage = True  # a term of the read-out that Hermann et al. do not have
    config.model.dropout_rate = 0.5  # of embeddings, and before the output layer
    # Peculiarities of the released code; see docs/differences.md.
    config.model.unscaled_dropout = False  # dropout scales at inference rather than in training
    config.model.count_padding = True  # statistics include padding where the released code does
    config.model.identical_blocks = True  # kernels of one shape start from one matrix
    config.model.double_bias = True  # the LSTM's bias is added twice
    return config


def make_model(
    model: ConfigDict,
    vocab_size: int,
    passage_steps: int,
    question_steps: int,
    axis_name: str | None = None,
) -> AttentiveReader:
    """The reader of `config.model`; `*_steps`: most time steps of training passages and questions.

    Raises:
      UserError: `max_steps` exceeds the longest training passage.
    """
    check_max_steps(model, passage_steps, "passages")
    return AttentiveReader(
        vocab_size=vocab_size,
        features=model.features,
        **FORMS[model.kind],
        quirks=Quirks(**{field.name: model[field.name] for field in dataclasses.fields(Quirks)}),
        dropout_rate=model.dropout_rate,
        passage_steps=model.max_steps or passage_steps,
        question_steps=min(model.max_steps or question_steps, question_steps),
        momentum=model.momentum,
        scale_init=nn.initializers.constant(model.initial_scale),
        axis_name=axis_name,
        dtype=model.dtype,
        implementation=model.implementation,
    )


class Task(tasks.Task):
    """Answers a question on a passage by a word; see `experiments.tasks.Task`."""

    selection = "error"
    lower_is_better = True
    shown = ("error", "entity_error")

    def __init__(self, config: ConfigDict, devices: Devices = ONE_DEVICE) -> None:
        """Loads `config.dataset`, cuts its passages, and numbers its words."""
        check(config)
        self.config = config
        self.notes: list[str] = []
        self.record: dict[str, Any] = {}
        data = self._cut(questions.load(config.dataset, config.data_dir, config.subset))
        self.data = data.name
        self.splits = {split: self._within_limit(split, data.splits[split]) for split in SPLITS}
        data = dataclasses.replace(data, splits=self.splits)
        self.vocabulary = questions.make_vocabulary(data, config.min_count, config.join_numbers)
        self.questions = data
        words = self.vocabulary.words
        self.is_entity = np.zeros(len(words), bool)
        self.is_entity[self.vocabulary.entities] = True
        self._tell_unknown()
        counts = {split: len(part.answers) for split, part in self.splits.items()}
        check_batch_size(config, counts["train"], self.data)
        self.updates_per_epoch = counts["train"] // config.batch_size
        self.train_order = functools.lru_cache(maxsize=1)(self._train_order)
        self.passage_lengths = self._padded_lengths()
        self.question_length = 1 + max(int(s.questions.lengths.max()) for s in self.splits.values())
        # If statistics include padding, one more step: the longest text has one step of padding.
        steps = [
            int(texts.lengths.max()) + config.model.count_padding
            for texts in self.splits["train"][:2]
        ]
        self.model = make_model(config.model, len(words), *steps, devices.statistics_axis)
        layer = self.model.recurrent_layer(nn.initializers.zeros_init(), None)
        self.implementation = implementation_of(layer, config.batch_size)
        if self.model.input_statistics == "sequence":
            self.batch_inputs = functools.partial(with_input_statistics, self.model)
        self.record |= {
            "dataset": self.data,
            "dataset_sha256": data.digest,
            "vocabulary_size": len(words),
            "questions": counts,
            "skipped_in_preparation": data.skipped,
            "padded_lengths": self.passage_lengths,
        }
        self.notes.append(
            f"{len(words):,} words, {counts['train']:,} training questions, passages padded to "
            f"{', '.join(map(str, self.passage_lengths))} words"
        )

    def train_indices(self, update: int) -> np.ndarray:
        """The questions of an update. Each epoch has its own order, and only whole batches."""
        epoch, number = divmod(update, self.updates_per_epoch)
        size = self.config.batch_size
        return self.train_order(epoch)[number * size : (number + 1) * size]

    def train_batch(self, update: int, share: Share = all_rows) -> Batch:
        """A share of the batch of an update, with entities permuted as the config says."""
        table = self.vocabulary.table
        if self.config.permute_entities:
            entities = self.vocabulary.entities
            permuted = np.arange(len(self.vocabulary.words), dtype=np.int32)
            random = np.random.default_rng([self.config.seed, update, 1])
            permuted[entities] = random.permutation(entities)
            table = permuted[table]
        return self.make_batch("train", self.train_indices(update), table, share)

    def num_examples(self, split: str, reading: Reading) -> int:
        """Number of questions of a split."""
        return len(self.splits[split].answers)

    def batches(
        self, split: str, batch_size: int, reading: Reading, share: Share = all_rows
    ) -> Iterator[Batch]:
        """Questions of a split in `evaluation_order`, sorted as `config.sorted_batches` says."""
        order = evaluation_order(self.num_examples(split, reading))
        order = self._arrange(split, order, batch_size)
        for indices in in_batches(order, batch_size):
            yield self.make_batch(split, indices, self.vocabulary.table, share)

    def inputs(self, batch: Batch, carry: Any = None) -> tuple[Any, ...]:
        """Passages, questions and the lengths of both."""
        names = ("passage", "question", "passage_length", "question_length")
        return tuple(batch[name] for name in names)

    def metrics(self, outputs: Array, batch: Batch) -> Metrics:
        """Loss in nats and error of logits `[batch, V]`.

        `entity_error` is the error if only entities of the passage are allowed as answers. An
        answer outside the vocabulary always counts as an error.
        """
        answer, passage = batch["answer"], batch["passage"]
        count = jnp.float32(len(answer))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(outputs), answer[:, None], axis=1)
        nats = -jnp.logaddexp(log_p, math.log(LOSS_FLOOR))
        inside = jnp.arange(passage.shape[1]) < batch["passage_length"][:, None]
        candidate = inside & jnp.asarray(self.is_entity)[passage]
        scores = jnp.where(candidate, jnp.take_along_axis(outputs, passage, axis=1), -jnp.inf)
        best = jnp.take_along_axis(passage, scores.argmax(1)[:, None], axis=1)[:, 0]
        known = answer >= len(SPECIALS)

        def wrong(given: Array) -> tuple[Array, Array]:
            right = (given == answer) & known
            return jnp.sum(~right, dtype=jnp.float32), count

        return {
            "loss": (jnp.sum(nats), count),
            "error": wrong(outputs.argmax(1)),
            "entity_error": wrong(jnp.where(candidate.any(1), best, -1)),
        }

    def make_batch(
        self, split: str, indices: np.ndarray, table: np.ndarray, share: Share = all_rows
    ) -> Batch:
        """A share of the questions at `indices`, as words of the vocabulary.

        Passages are padded to the smallest of `passage_lengths` that leaves a word of padding after
        each, as in the released code. Questions are padded to one length. Padding depends on all of
        `indices`. `table` maps words of the data set to words of the vocabulary.
        """
        part = self.splits[split]
        own = indices[share(len(indices))]

        def pad(texts: Texts, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
            longest = max(len(texts[i]) for i in indices)
            size = next(size for size in sizes if size > longest)
            chosen = [texts[i] for i in own]
            lengths = np.array([len(text) for text in chosen], np.int32)
            words = np.zeros((len(chosen), size), np.int32)
            for row, text in zip(words, chosen, strict=True):
                row[: len(text)] = table[text]
            return words, lengths

        passage, passage_length = pad(part.passages, self.passage_lengths)
        question, question_length = pad(part.questions, [self.question_length])
        return {
            "passage": passage,
            "passage_length": passage_length,
            "question": question,
            "question_length": question_length,
            "answer": table[part.answers[own]],
        }

    def _cut(self, data: questions.Questions) -> questions.Questions:
        """Cuts passages to `config.num_sentences` sentences."""
        config = self.config
        if not config.num_sentences:
            return data
        data = questions.select_sentences(
            data,
            Selection(
                config.num_sentences,
                config.sentence_rule,
                config.sentence_length_power,
                config.sentence_ties,
            ),
        )
        kept = {split: questions.answers_kept(data.splits[split]) for split in SPLITS}
        self.record["answers_kept"] = kept
        shares = ", ".join(f"{share:.1%} of {split}" for split, share in kept.items())
        self.notes.append(f"the kept sentences contain the answers of {shares} questions")
        return data

    def _within_limit(self, split: str, part: Split) -> Split:
        """Leaves out questions whose passages are too long, and notes their number."""
        limit = self.config.max_passage_length
        within = np.flatnonzero(part.passages.lengths <= limit)
        if left_out := len(part.answers) - len(within):
            self.notes.append(
                f"left out {left_out:,} of {len(part.answers):,} {split} questions, whose passages "
                f"have more than {limit:,} words (config.max_passage_length)"
            )
            part = part.select(within)
        if not len(part.answers):
            raise UserError(
                f"config.max_passage_length is {limit}: {self.data} has no {split} passage of at "
                f"most {limit} words; increase it"
            )
        self.record.setdefault("too_long", {})[split] = left_out
        return part

    def _tell_unknown(self) -> None:
        """Notes answers that are not in the vocabulary."""
        for split, part in self.splits.items():
            unknown = int(np.sum(~self.is_entity[self.vocabulary.table[part.answers]]))
            if unknown:
                self.notes.append(
                    f"the answers of {unknown:,} of {len(part.answers):,} {split} questions are "
                    "rarer in training questions than config.min_count: they count as errors"
                )

    def _padded_lengths(self) -> list[int]:
        """The padded lengths of passages; about equally many batches of an epoch use each."""
        lengths = self.splits["train"].passages.lengths[self.train_order(0)]
        longest = lengths.reshape(-1, self.config.batch_size).max(1)
        shares = np.arange(1, self.config.num_lengths + 1) / self.config.num_lengths
        chosen = np.quantile(longest, shares, method="higher")
        chosen[-1] = max(part.passages.lengths.max() for part in self.splits.values())
        return sorted({int(-(-(n + 1) // ROUNDING) * ROUNDING) for n in chosen})

    def _train_order(self, epoch: int) -> np.ndarray:
        num_examples = len(self.splits["train"].answers)
        order = epoch_order(num_examples, self.config.seed, epoch)
        whole = self.updates_per_epoch * self.config.batch_size
        return self._arrange("train", order[:whole], self.config.batch_size)

    def _arrange(self, split: str, order: np.ndarray, batch_size: int) -> np.ndarray:
        """Sorts questions by length within every `config.sorted_batches` batches."""
        if self.config.sorted_batches == 1:
            return order
        lengths = self.splits[split].passages.lengths
        groups = in_batches(order, self.config.sorted_batches * batch_size)
        return np.concatenate([g[np.argsort(-lengths[g], kind="stable")] for g in groups])


def check(config: ConfigDict) -> None:
    """Refuses values that this task cannot run with.

    Raises:
      UserError: names the field and what it may be.
    """
    check_fields(config, reader_config(base_config()))
    questions.check(config.dataset, config.subset)
    one_of("config.sentence_rule", config.sentence_rule, questions.SENTENCE_RULES)
    one_of("config.sentence_ties", config.sentence_ties, questions.SENTENCE_TIES)
    lowest = {"num_sentences": 0, "sentence_length_power": 0}
    lowest |= {"min_count": 1, "max_passage_length": 1, "sorted_batches": 1, "num_lengths": 1}
    for name, bound in lowest.items():
        at_least(f"config.{name}", config[name], bound)
    at_most("config.num_lengths", config.num_lengths, MAX_LENGTHS)
    if not 0 <= config.model.dropout_rate < 1:
        raise UserError(
            f"config.model.dropout_rate is {config.model.dropout_rate}: it must be at least 0 and "
            "less than 1"
        )
