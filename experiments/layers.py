"""The recurrent layer that a config describes."""

import flax.linen as nn
from ml_collections import ConfigDict

import bnlstm_jax
from bnlstm_jax import initializers
from experiments.config import words
from experiments.errors import UserError


def matmul_dtype(model: ConfigDict) -> str | None:
    """The dtype of products' operands, as modules are told: None for that of the parameters."""
    return None if model.dtype == "float32" else model.dtype


def recurrent_layer(
    model: ConfigDict, sequence_length: int, vocab_size: int | None = None
) -> bnlstm_jax.LSTM | bnlstm_jax.BNLSTM:
    """The layer of `config.model`, for training sequences of `sequence_length` steps.

    With `vocab_size` its inputs are symbols.

    Raises:
      UserError: there are to be statistics of steps that no training sequence has.
    """
    if model.max_steps > sequence_length:
        raise UserError(
            f"config.model.max_steps is {model.max_steps}, and training sequences have "
            f"{sequence_length} steps: later ones would never have statistics; make it at most "
            "that, or 0 for all of them"
        )
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
        normalize=words(model.normalize),
        input_statistics=model.input_statistics,
        momentum=model.momentum,
        scale_init=nn.initializers.constant(model.initial_scale),
        initial_hidden_noise=model.initial_hidden_noise,
    )
