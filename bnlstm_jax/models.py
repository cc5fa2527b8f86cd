"""Models made of the layers: what the paper's experiments train."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bnlstm_jax import initializers
from bnlstm_jax.cells import Carry, product


class Readout(nn.Module):
    """A linear map from hidden states `[..., H]` to logits `[..., features]`.

    As in the recurrent layers, `dtype` is that of the product's operands alone.
    """

    features: int
    dtype: Any = None
    kernel_init: initializers.Initializer = initializers.semi_orthogonal()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """Logits, in float32 or wider."""
        shape = hidden.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[1:], self.param_dtype)
        return product(hidden, kernel, self.dtype) + bias


class SequenceClassifier(nn.Module):
    """A recurrent layer, and a linear read-out of its last hidden state.

    Attributes:
      layer: an LSTM or BNLSTM.
      num_classes: number of classes K.
      dtype: dtype of the operands of the read-out's product; logits are float32.
    """

    layer: nn.Module
    num_classes: int
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        seq_lengths: Array | None = None,
        use_running_average: bool | None = None,
    ) -> Array:
        """Sequences `[batch, time, features]` to logits `[batch, K]`, in nats."""
        (_, hidden), _ = self.layer(
            inputs,
            seq_lengths=seq_lengths,
            return_carry=True,
            use_running_average=use_running_average,
        )
        return Readout(self.num_classes, self.dtype, name="readout")(hidden)


class LanguageModel(nn.Module):
    """A recurrent layer over symbols, and a linear read-out of every hidden state.

    Attributes:
      layer: an LSTM or BNLSTM with a `vocab_size`.
      dtype: dtype of the operands of the read-out's product; logits are float32.
    """

    layer: nn.Module
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        symbols: Array,
        initial_carry: Carry | None = None,
        first_step: Array | int | None = None,
        use_running_average: bool | None = None,
        return_carry: bool = False,
    ) -> Array | tuple[Carry, Array]:
        """Symbols `[batch, time]` to the logits of what follows each, `[batch, time, V]`, in nats.

        At inference a long text may be read in pieces: each takes the carry of the one before as
        `initial_carry`, and the number of symbols before it as `first_step`.

        Returns:
          The logits; with `return_carry` the carry `(c, h)` after the last symbol, and the logits.
        """
        carry, hidden = self.layer(
            symbols,
            initial_carry=initial_carry,
            first_step=first_step,
            return_carry=True,
            use_running_average=use_running_average,
        )
        logits = Readout(self.layer.vocab_size, self.dtype, name="readout")(hidden)
        return (carry, logits) if return_carry else logits
