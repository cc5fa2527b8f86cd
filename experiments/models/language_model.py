"""A model that predicts the next symbol after each symbol of a text."""

from typing import Any

import flax.linen as nn
from jax import Array

from bnlstm_jax.cells import Carry
from experiments.models.readout import Readout


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
        """Maps symbols `[batch, time]` to logits of the next ones, `[batch, time, V]`, in nats.

        At inference a long text may be read in pieces. A piece takes the carry of the piece before
        it as `initial_carry`, and the number of symbols before it as `first_step`.

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
