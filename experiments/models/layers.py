"""The recurrent layer that a config describes."""

import flax.linen as nn
from ml_collections import ConfigDict

import bnlstm_jax
from bnlstm_jax import initializers, recurrence
from bnlstm_jax.layers import Layer, abstract_problem
from bnlstm_jax.recurrence.native import cpu
from experiments.runtime.checks import at_least, one_of, words
from experiments.runtime.errors import UserError


def layer_config(config: ConfigDict) -> ConfigDict:
    """Adds the fields of models with one recurrent layer to the fields that all models share."""
    config.model.recurrent_init = "orthogonal"  # or identity, for the candidate's block only
    config.model.initial_hidden_noise = 0.0  # standard deviation; only in the BN-LSTM
    config.model.normalize = ("input", "recurrent", "cell")  # ablation: which terms
    config.model.input_statistics = "per_step"  # or sequence: of all time steps together
    config.model.shared_statistics = False  # ablation: time steps share population statistics
    return config


def check(model: ConfigDict) -> None:
    """Refuses values that no layer accepts.

    Raises:
      UserError: names the field and what it may be.
    """
    one_of("config.model.recurrent_init", model.recurrent_init, ("orthogonal", "identity"))
    one_of("config.model.input_statistics", model.input_statistics, ("per_step", "sequence"))
    if model.shared_statistics and model.max_steps:
        raise UserError(
            f"config.model.max_steps is {model.max_steps}: it must be 0 with "
            "config.model.shared_statistics"
        )
    for term in words(model.normalize):
        one_of("config.model.normalize", term, ("input", "recurrent", "cell"))
    at_least("config.model.initial_hidden_noise", model.initial_hidden_noise, 0)


def implementation_of(layer: Layer, batch_size: int) -> str:
    """The implementation that runs a layer's recurrence here: `cpu, AVX2, 2 threads`, or `xla`.

    Raises:
      UserError: the layer's `implementation` does not support it (the message names another) or
        cannot be compiled, or `BNLSTM_NUM_THREADS` is invalid.
    """
    name, problem = layer.implementation, abstract_problem(layer, batch_size)
    try:
        reason = recurrence.why_unsupported(name, problem)
    except RuntimeError as error:  # from a compiler
        raise UserError(f"config.model.implementation is {name}: {error}") from error
    if reason is not None:
        pooled = "axis_name" in reason
        other = ", or config.parallel.devices 1" if pooled else ""
        raise UserError(
            f"config.model.implementation is {name}, which {reason}: make it xla{other}"
        )

    name = recurrence.choose(name, problem)
    if name != "cpu":
        return name
    try:
        threads = cpu.threads()
    except ValueError as error:
        raise UserError(str(error)) from error
    return f"{name}, {cpu.instruction_set()}, {threads} thread{'s' * (threads != 1)}"


def check_max_steps(model: ConfigDict, steps: int, sequences: str) -> None:
    """Refuses statistics of time steps that no training sequence has.

    Raises:
      UserError: says how many steps the training `sequences` have.
    """
    if model.max_steps > steps:
        raise UserError(
            f"config.model.max_steps is {model.max_steps}: it must be at most {steps}, the time "
            f"steps of training {sequences}, or 0 for all of them"
        )


def recurrent_layer(
    model: ConfigDict,
    sequence_length: int,
    vocab_size: int | None = None,
    axis_name: str | None = None,
) -> Layer:
    """The layer of `config.model`, for training sequences of `sequence_length` steps.

    With `vocab_size` its inputs are symbols. `axis_name`: mapped axis over which batch statistics
    are pooled.

    Raises:
      UserError: a field has an invalid value, or `max_steps` exceeds `sequence_length`.
    """
    check(model)
    check_max_steps(model, sequence_length, "sequences")
    shared = {
        "features": model.features,
        "vocab_size": vocab_size,
        "dtype": model.dtype,
        "implementation": model.implementation,
        "recurrent_kernel_init": (
            initializers.identity_block()
            if model.recurrent_init == "identity"
            else initializers.semi_orthogonal()
        ),
    }
    normalized = {
        "normalize": words(model.normalize),
        "scale_init": nn.initializers.constant(model.initial_scale),
    }
    if model.kind == "lstm":
        return bnlstm_jax.LSTM(**shared)
    if model.kind == "ln_lstm":
        return bnlstm_jax.LNLSTM(**shared, **normalized)
    return bnlstm_jax.BNLSTM(
        **shared,
        **normalized,
        axis_name=axis_name,
        max_steps=None if model.shared_statistics else model.max_steps or sequence_length,
        shared_statistics=model.shared_statistics,
        input_statistics=model.input_statistics,
        momentum=model.momentum,
        initial_hidden_noise=model.initial_hidden_noise,
    )
