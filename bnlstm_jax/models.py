"""Models made of the layers: what the paper's experiments train."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bnlstm_jax import initializers


class SequenceClassifier(nn.Module):
    """A recurrent layer, and a linear read-out of its last hidden state.

    Attributes:
      layer: an LSTM or BNLSTM.
      num_classes: number of classes K.
      dtype: dtype of the read-out's product; logits are float32.
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
        readout = nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            kernel_init=initializers.semi_orthogonal(),
            name="readout",
        )
        return readout(hidden).astype(jnp.promote_types(hidden.dtype, jnp.float32))
