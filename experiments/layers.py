"""The recurrent layer that a config describes."""

import flax.linen as nn
from ml_collections import ConfigDict

import bnlstm_jax
from bnlstm_jax import initializers
from experiments.errors import UserError


def recurrent_layer(model: ConfigDict, sequence_length: int) -> bnlstm_jax.LSTM | bnlstm_jax.BNLSTM:
    """The layer of `config.model`, for training sequences of `sequence_length` steps.

    Raises:
      UserError: `max_steps` is shorter than that.
    """
    max_steps = model.max_steps or sequence_length
    if max_steps < sequence_length:
        raise UserError(
            f"config.model.max_steps is {max_steps}, shorter than a training sequence of "
            f"{sequence_length} steps: make it at least that, or 0 for just that"
        )
    shared = {
        "features": model.features,
        "dtype": None if model.dtype == "float32" else model.dtype,
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
        max_steps=max_steps,
        normalize=tuple(model.normalize),
        input_statistics=model.input_statistics,
        momentum=model.momentum,
        scale_init=nn.initializers.constant(model.initial_scale),
        initial_hidden_noise=model.initial_hidden_noise,
    )
