"""A linear map from hidden states to logits."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bnlstm_jax import initializers
from bnlstm_jax.cells import product
from bnlstm_jax.normalization import along


class Readout(nn.Module):
    """A linear map from hidden states `[..., H]` to logits `[..., features]`.

    Attributes:
      features: number of logits.
      dtype: dtype of the product's operands; logits are float32 or wider.
      kernel_init: initialiser of `kernel [H, features]`.
      param_dtype: dtype of the parameters `kernel` and `bias`.
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
        logits = product(hidden, kernel, self.dtype)
        return logits + along(logits, bias)
