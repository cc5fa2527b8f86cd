"""The recurrent layer that a config describes."""

import flax.linen as nn
from ml_collections import ConfigDict

import bnlstm_jax
from bnlstm_jax import initializers


def matmul_dtype(model: ConfigDict) -> str | None:
    """The dtype of products' operands, as modules are told: None for that of the parameters."""
    return None if model.dtype == "float32" else model.dtype


def recurrent_layer(
    model: ConfigDict, sequence_length: int, vocab_size: int | None = None
) -> bnlstm_jax.LSTM | bnlstm_jax.BNLSTM:
    """The layer of `config.model`, for training sequences of `sequence_length` steps.

    With `vocab_size` its inputs are symbols.
    """
    shared = {
        "features": model.features,
        "vocab_size": vocab_size,
        "dtype": matmul_dtype(model),
        "recurrent_kernel_init": (
            initializers.identity_block()
            if model.recurrent_init == "identity"
            else initializers.semi_orthogonal()
        ),
    }
    if model.kind == "lstm":
        return bnlstm_jax.LSTM(**shared)
    return bnlstm_jax.BNLSTM(
        **shared,
        max_steps=model.max_steps or sequence_length,
        normalize=tuple(model.normalize),
        input_statistics=model.input_statistics,
        momentum=model.momentum,
        scale_init=nn.initializers.constant(model.initial_scale),
        initial_hidden_noise=model.initial_hidden_noise,
    )
