"""A classifier of sequences."""

from typing import Any

import flax.linen as nn
from jax import Array

from experiments.models.readout import Readout


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
    def __call__(self, inputs: Array, use_running_average: bool | None = None) -> Array:
        """Maps sequences `[batch, time, features]` to logits `[batch, K]`, in nats."""
        (_, hidden), _ = self.layer(inputs, use_running_average, return_carry=True)
        return Readout(self.num_classes, self.dtype, name="readout")(hidden)
