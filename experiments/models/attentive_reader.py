"""The Attentive Reader in the five forms of the paper: questions on passages, answered by a word.

After Hermann et al., "Teaching Machines to Read and Comprehend" (2015), as in the released code of
"Recurrent Batch Normalization". Vectors are rows, and padding is masked everywhere:

    y_t, u = encoder of the passage at t, last state of the question's encoder
    m_t = tanh(N(y_t W_d) + N(u W_u) + b_d + s_t)           s_t = (y_t M) . (u M)
    a   = softmax over the passage of m_t . w
    r   = sum over the passage of a_t y_t
    g   = tanh(N(r W_r) + N(u W_q) + N(y W_m) + b_q)        y the mean over the passage of y_t
    logits = g W_o + b_o

N is batch normalisation (equation 5 of the paper) in the forms that normalise attention and
read-out, and the identity in the others. Hermann's reader has neither s_t nor the mean y.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Initializer
from jax import Array

from bnlstm_jax import BNLSTM, LSTM
from bnlstm_jax.batch_norm import BatchNorm
from bnlstm_jax.cells import Variant, look_up, product
from experiments.models import reader_initializers
from experiments.models.readout import Readout

SEQUENCE_EPSILON = 1e-6  # of sequence-wise input statistics, as in the released code

# The paper's five readers, each as fields of `AttentiveReader`.
FORMS = {
    "lstm": {},
    "bn_lstm": {"normalize_recurrence": True},
    "bn_everywhere": {"normalize_recurrence": True, "normalize_attention": True},
    "bn_e_star": {
        "normalize_recurrence": True,
        "normalize_attention": True,
        "input_statistics": "sequence",
    },
    "bn_e_star_star": {
        "normalize_recurrence": True,
        "normalize_attention": True,
        "input_statistics": "sequence",
        "bidirectional": True,
    },
}


@dataclasses.dataclass(frozen=True)
class Quirks:
    """Properties of the released reader that neither paper mentions; see docs/differences.md.

    Attributes:
      count_padding: statistics include padding, except sequence-wise input statistics. A finished
        sequence counts with its last state, and statistics of W_d's term include one step of
        padding after the longest passage. If False, no statistic includes padding.
      identical_blocks: kernels of one shape start from one matrix, and all blocks of square ones;
        see `reader_initializers`.
      double_bias: the LSTM's bias is added twice, which doubles its learning rate. In BN-LSTMs the
        normalisation removes the second one.
      unscaled_dropout: dropout scales at inference (down) instead of in training (up), as the
        released code does on four sentences.
      bilinear: attention has the term s_t.
      mean_passage: the read-out has the mean over the passage, y.
      square_scale: scale of the orthogonal matrices that initialise square kernels.
    """

    count_padding: bool = False
    identical_blocks: bool = False
    double_bias: bool = False
    unscaled_dropout: bool = False
    bilinear: bool = True
    mean_passage: bool = True
    square_scale: float = 0.05


class Encoder(nn.Module):
    """A recurrent layer over padded sequences, in one direction or in both.

    Attributes:
      layer: an LSTM or BNLSTM; the backward direction has a second one like it.
      bidirectional: also run backwards, from the last valid step of each sequence to the first.
    """

    layer: nn.Module
    bidirectional: bool = False

    @nn.compact
    def __call__(
        self, inputs: Sequence[Array], lengths: Array, use_running_average: bool | None
    ) -> tuple[Array, Array]:
        """Encodes sequences.

        Args:
          inputs: sequences `[batch, time, D]` for each direction.
          lengths: their valid steps, integers `[batch]`.
          use_running_average: as in BNLSTM.

        Returns:
          The hidden states y `[batch, time, K]` and the last ones u `[batch, K]`. K is H, or 2H for
          both directions, concatenated. In padding, the forward half of y repeats the last state
          and the backward half is zero.
        """
        names = ("forward", "backward") if self.bidirectional else ("forward",)
        hidden, last = [], []
        for name, x in zip(names, inputs, strict=True):
            backward = name == "backward"
            layer = self.layer.clone(
                parent=self, name=name, reverse=backward, keep_order=backward, return_carry=True
            )
            (_, u), y = layer(x, seq_lengths=lengths, use_running_average=use_running_average)
            hidden.append(jnp.where(padding_mask(lengths, y.shape[1]), y, 0) if backward else y)
            last.append(u)
        return jnp.concatenate(hidden, -1), jnp.concatenate(last, -1)


class AttentiveReader(nn.Module):
    """Answers questions on passages by a word of the vocabulary.

    Example::

        reader = AttentiveReader(
            65_830, 240, **FORMS["bn_e_star"], passage_steps=2000, question_steps=50)
        inputs = passages, questions, passage_lengths, question_lengths
        variables = reader.init(key, *inputs, use_running_average=True)
        # Training, then inference.
        logits, updated = reader.apply(
            variables, *inputs, use_running_average=False, rngs={"dropout": key},
            mutable=["batch_stats"])
        logits = reader.apply({**variables, **updated}, *inputs, use_running_average=True)

    The attention weights `[batch, time]` are in the collection `intermediates`, under `attention`,
    if `apply` makes this collection mutable.

    Attributes:
      vocab_size: number of words V.
      features: size d of embeddings, attention and read-out, and hidden units of each direction of
        an encoder.
      normalize_recurrence: the encoders are BNLSTMs rather than LSTMs.
      input_statistics: as in BNLSTM, `per_step` or `sequence`.
      normalize_attention: normalise the terms of attention and read-out, except s_t.
      bidirectional: encode in both directions.
      quirks: peculiarities of the released code.
      dropout_rate: of embeddings, with one mask for each direction, and of g.
      passage_steps, question_steps: `max_steps` of the encoders' statistics.
      momentum, epsilon, scale_init: of all normalisation.
      axis_name: mapped axis over which batch statistics are pooled.
      implementation: of the recurrence; see `LSTM`.
      dtype: dtype of the operands of matrix products; logits are float32 or wider.
      param_dtype: dtype of the parameters.
    """

    vocab_size: int
    features: int
    normalize_recurrence: bool = False
    input_statistics: str = "per_step"
    normalize_attention: bool = False
    bidirectional: bool = False
    quirks: Quirks = Quirks()
    dropout_rate: float = 0.5
    passage_steps: int | None = None
    question_steps: int | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.constant(0.1)
    axis_name: str | None = None
    implementation: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        passages: Array,
        questions: Array,
        passage_lengths: Array,
        question_lengths: Array,
        use_running_average: bool | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Maps padded passages and questions to the logits of answers `[batch, V]`, in nats.

        Args:
          passages: words, integers `[batch, time]`; padding may have any values in `[0, V)`.
          questions: the same, of another length.
          passage_lengths: words of each passage, integers `[batch]`.
          question_lengths: words of each question.
          use_running_average: normalise by the collection `batch_stats`, not by batch statistics.
          deterministic: no dropout; the default is True if there is no rng stream `dropout`.
        """
        if deterministic is None:
            deterministic = not self.has_rng("dropout")
        quirks = self.quirks
        fan_uniform = reader_initializers.fan_uniform(quirks.identical_blocks)
        square = reader_initializers.orthogonal_blocks(quirks.square_scale, quirks.identical_blocks)
        embedding = self.matrix("embedding", fan_uniform, self.vocab_size, self.features)

        def dropout(x: Array) -> Array:
            x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
            return (1 - self.dropout_rate) * x if quirks.unscaled_dropout else x

        def encode(
            name: str, words: Array, lengths: Array, steps: int | None
        ) -> tuple[Array, Array]:
            embedded = look_up(words, embedding, self.dtype)
            inputs = [dropout(embedded) for _ in range(1 + self.bidirectional)]
            encoder = Encoder(self.recurrent_layer(square, steps), self.bidirectional, name=name)
            return encoder(inputs, lengths, use_running_average)

        y, _ = encode("passage", passages, passage_lengths, self.passage_steps)  # [B, T, K]
        _, u = encode("question", questions, question_lengths, self.question_steps)  # [B, K]
        attention = self.attend(y, u, passage_lengths, square, use_running_average)
        attended = jnp.sum(attention * y, axis=1)

        g = self.term("attended", attended, use_running_average)
        g += self.term("readout_question", u, use_running_average) + self.bias("readout_bias")
        if quirks.mean_passage:
            total = jnp.sum(jnp.where(padding_mask(passage_lengths, y.shape[1]), y, 0), axis=1)
            mean = total / jnp.maximum(passage_lengths, 1)[:, None]
            g += self.term("mean", mean, use_running_average)
        g = dropout(jnp.tanh(g))
        return Readout(self.vocab_size, self.dtype, fan_uniform, self.param_dtype, name="readout")(
            g
        )

    def attend(
        self,
        y: Array,
        u: Array,
        lengths: Array,
        square: Initializer,
        use_running_average: bool | None,
    ) -> Array:
        """Weights `[B, T, 1]` of the passage states y `[B, T, K]`, for questions u `[B, K]`."""
        size, steps = y.shape[-1], y.shape[1]
        valid = padding_mask(lengths, steps)  # [B, T, 1]
        counted = valid
        if self.quirks.count_padding and not use_running_average:
            longest = jnp.max(lengths)
            if self.axis_name is not None and not self.is_initializing():
                longest = jax.lax.pmax(longest, self.axis_name)
            counted = padding_mask(jnp.full_like(lengths, longest) + 1, steps)
        init = square if size == self.features else None
        m = self.term("passage", y, use_running_average, init, counted)
        m += self.bias("attention_bias")
        m += self.term("question", u, use_running_average)[:, None]
        if self.quirks.bilinear:  # (y M) . (u M) = y . (u M M^T), which avoids the product y M
            kernel = self.matrix("bilinear_kernel", square, size, size)
            v = product(product(u, kernel, self.dtype), kernel.T, self.dtype)
            m += product(y, v[..., None], self.dtype)
        width = reader_initializers.uniform(1 / math.sqrt(self.features))
        kernel = self.matrix("attention_kernel", width, self.features, 1)
        scores = product(jnp.tanh(m), kernel, self.dtype)
        # The finite minimum avoids NaN for an empty passage, whose weights are then all 0.
        scores = jnp.where(valid, scores, jnp.finfo(scores.dtype).min)
        attention = jnp.where(valid, jax.nn.softmax(scores, axis=1), 0)
        self.sow("intermediates", "attention", attention[..., 0])
        return attention

    def term(
        self,
        name: str,
        x: Array,
        use_running_average: bool | None,
        init: Initializer | None = None,
        where: Array | None = None,
    ) -> Array:
        """`N(x W)`, or `x W` where attention is not normalised: `[..., d]`."""
        init = init or reader_initializers.fan_uniform(self.quirks.identical_blocks)
        kernel = self.matrix(f"{name}_kernel", init, x.shape[-1], self.features)
        x = product(x, kernel, self.dtype)
        if not self.normalize_attention:
            return x
        norm = BatchNorm(name=f"{name}_norm", param_dtype=self.param_dtype, **self.normalization())
        return norm(x, use_running_average, mask=where)

    def bias(self, name: str) -> Array:
        """A parameter `[d]` that starts at zero."""
        zeros = nn.initializers.zeros_init()
        return self.param(name, zeros, (self.features,), self.param_dtype)

    def matrix(self, name: str, init: Initializer, rows: int, columns: int) -> Array:
        """A parameter `[rows, columns]`."""
        return self.param(name, init, (rows, columns), self.param_dtype)

    @nn.nowrap
    def normalization(self) -> dict[str, Any]:
        """The arguments that all normalisation shares."""
        return {
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "scale_init": self.scale_init,
            "axis_name": self.axis_name,
        }

    @nn.nowrap
    def recurrent_layer(self, init: Initializer, steps: int | None) -> nn.Module:
        """A layer of the encoders, without a parent."""
        shared = {
            "features": self.features,
            "input_kernel_init": init,
            "recurrent_kernel_init": init,
            "bias_init": nn.initializers.zeros_init(),
            "implementation": self.implementation,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "parent": None,
        }
        quirks = self.quirks
        if not self.normalize_recurrence:
            factor = 2.0 if quirks.double_bias else 1.0
            return LSTM(**shared, variant=Variant(factor, cell_bias=False, learned_cell=False))
        sequence = self.input_statistics == "sequence"
        epsilon = SEQUENCE_EPSILON if sequence else None
        return BNLSTM(
            **shared,
            **self.normalization(),
            max_steps=steps,
            input_statistics=self.input_statistics,
            variant=Variant(learned_cell=False, input_epsilon=epsilon),
            mask_statistics=(("input",) if sequence else ()) if quirks.count_padding else True,
        )


def with_input_statistics(
    reader: AttentiveReader, variables: dict[str, Any], inputs: tuple[Array, ...]
) -> dict[str, Any]:
    """Variables with batch statistics for the encoders' input terms, and otherwise unchanged.

    The paper's released code evaluates readers with `input_statistics="sequence"` this way. See
    docs/differences.md.

    Args:
      reader: the model, with `input_statistics="sequence"`.
      variables: its parameters and population statistics.
      inputs: the reader's positional arguments for the batch.

    Returns:
      Variables to call the reader with on this batch, with `use_running_average=True`.

    Raises:
      ValueError: the batch has one question.
    """
    forgetful = reader.clone(momentum=0.0)  # its running averages are the batch's statistics
    _, updated = forgetful.apply(
        variables, *inputs, use_running_average=False, mutable=["batch_stats"]
    )
    of_batch = flatten_dict(updated["batch_stats"])
    statistics = {
        path: of_batch[path] if path[-1].startswith("input_") else value
        for path, value in flatten_dict(variables["batch_stats"]).items()
    }
    return {**variables, "batch_stats": unflatten_dict(statistics)}


def padding_mask(lengths: Array, steps: int) -> Array:
    """Which of `steps` time steps are valid, boolean `[batch, steps, 1]`, for lengths `[batch]`."""
    return (jnp.arange(steps) < lengths[:, None])[..., None]
