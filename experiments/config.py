"""The config fields that all experiments share, and the values that they accept."""

import importlib.util
import math

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from bnlstm_jax.recurrence import NAMES
from experiments.models.attentive_reader import FORMS
from experiments.runtime import paths
from experiments.runtime.checks import at_least, at_most, one_of
from experiments.runtime.errors import UserError

MODEL_KINDS = ("lstm", "bn_lstm", "ln_lstm")
READER_KINDS = tuple(FORMS)  # of the task question_answering
NO_BATCH_STATISTICS = ("lstm", "ln_lstm")
MAX_SEED = 2**32 - 1  # JAX uses 32 bits of a seed

# The values that `check` accepts, by field.
LOWEST = {
    "seed": 0,
    "batch_size": 1,
    "num_updates": 1,
    "updates_per_call": 1,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "eval_batch_size": 1,
    "population_batch_size": 1,
    "population_batches": 0,
    "parallel.devices": 0,
    "parallel.statistics_devices": 0,
    "model.features": 1,
    "model.max_steps": 0,
    "model.momentum": 0,
    "optimizer.learning_rate": 0,
    "optimizer.decay": 0,
}
CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.implementation": NAMES,
    "optimizer.name": ("rmsprop", "adam"),
    "optimizer.clip_rule": ("norm", "released_reader"),
    "optimizer.adam_epsilon": ("published", "released"),
    "population_late_steps": ("skip", "repeat"),
}


def base_config() -> ConfigDict:
    """The shared fields. A config file adds the fields of its task to them."""
    config = ConfigDict()
    config.task = ""  # a module of experiments.tasks
    config.seed = 1  # of initial parameters, example order and noise
    config.data_dir = "data"
    config.wandb = ""  # Weights & Biases project that also shows the run; empty: none
    config.batch_size = 100
    config.num_updates = 100_000
    config.updates_per_call = 1  # updates in one device call; see train.updates_at_once

    config.model = ConfigDict()
    config.model.kind = "bn_lstm"  # or lstm, ln_lstm; a list with commas trains and compares them
    config.model.features = 100
    config.model.initial_scale = 0.1  # gamma
    config.model.momentum = 0.99  # of the running average of batch statistics
    config.model.max_steps = 0  # time steps with statistics; 0: the length of training sequences
    config.model.dtype = "float32"  # of the operands of matrix products; or bfloat16
    config.model.implementation = "auto"  # of the recurrence; see bnlstm_jax/recurrence

    config.optimizer = ConfigDict()
    config.optimizer.name = "rmsprop"  # or adam
    config.optimizer.learning_rate = 1e-3
    config.optimizer.decay = 0.9  # of RMSProp's mean square
    config.optimizer.clip_norm = 1.0  # maximum global norm of the gradient
    config.optimizer.clip_rule = "norm"  # or released_reader: see experiments/optimizers.py
    config.optimizer.adam_epsilon = "published"  # or released: added before the bias correction

    # Data parallelism; see docs/parallel.md.
    config.parallel = ConfigDict()
    config.parallel.devices = 1  # devices of each process that share a batch; 0: all
    # Number of devices that share batch statistics. 0: all, over the whole batch; 1: none share.
    config.parallel.statistics_devices = 0

    # Intervals in updates. Validation uses batch statistics and chooses the best checkpoint.
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 500
    config.eval_batch_size = 1000  # of the final evaluation; validation uses batch_size
    # Population statistics average over full batches of this size. Reduce it if memory is short:
    # with 784 time steps and 100 units, the float32 hidden states of 5,000 examples take 1.6 GB.
    config.population_batch_size = 5000
    config.population_batches = 0  # maximum number; 0: one pass over the training data
    # What a batch contributes to time steps after its last: skip (nothing), or repeat (the
    # statistics of its last step).
    config.population_late_steps = "skip"
    return config


def model_kinds(config: ConfigDict) -> list[str]:
    """The kinds of model that a config names.

    Raises:
      UserError: `config.model.kind` names something else.
    """
    kinds = [kind.strip() for kind in config.model.kind.split(",")]
    allowed = READER_KINDS if config.task == "question_answering" else MODEL_KINDS
    for kind in kinds:
        one_of("config.model.kind", kind, allowed)
    return kinds


def has_batch_statistics(config: ConfigDict) -> bool:
    """Whether any of the config's models uses batch statistics."""
    return not set(model_kinds(config)).issubset(NO_BATCH_STATISTICS)


def check_rows(config: ConfigDict, rows: int, source: str) -> None:
    """Refuses a batch of one example if a model uses batch statistics.

    Raises:
      UserError: `rows` is 1, and a model uses them. The message begins with `source`, the origin of
        the batch.
    """
    if rows == 1 and has_batch_statistics(config):
        raise UserError(
            f"{source}: batch statistics need at least 2 examples; use more, or "
            "config.model.kind=lstm"
        )


def check_batch_sizes(config: ConfigDict) -> None:
    """Refuses batches of one example in training and for population statistics; see `check_rows`.

    Raises:
      UserError: names the field.
    """
    for field in ("batch_size", "population_batch_size"):
        check_rows(config, config[field], f"config.{field} is {config[field]}")


def check_fields(config: ConfigDict, expected: ConfigDict) -> None:
    """Refuses a config in which a field of `expected` is missing or has another type.

    The command line checks types, but a run's config.json may hold any value, or be of another
    version.

    Raises:
      UserError: names the field and its type.
    """
    flat = flatten_dict(config.to_dict(), sep=".")
    for name, value in flatten_dict(expected.to_dict(), sep=".").items():
        kinds = {float: (int, float), tuple: (tuple, list)}.get(type(value), type(value))
        if not isinstance(flat.get(name), kinds):
            given = repr(flat[name]) if name in flat else "missing"
            raise UserError(f"config.{name} is {given}: it must be of type {type(value).__name__}")


def check(config: ConfigDict) -> None:
    """Refuses values that are invalid for every task.

    Raises:
      UserError: names the field and what it may be.
    """
    check_fields(config, base_config())
    flat = flatten_dict(config.to_dict(), sep=".")
    for name, bound in LOWEST.items():
        at_least(f"config.{name}", flat[name], bound)
    at_most("config.seed", config.seed, MAX_SEED)
    for name in ("model.initial_scale", "optimizer.learning_rate"):
        if not math.isfinite(flat[name]):
            raise UserError(f"config.{name} is {flat[name]}: it must be a finite number")
    for name in ("model.momentum", "optimizer.decay"):
        if not flat[name] < 1:
            raise UserError(f"config.{name} is {flat[name]}: it must be less than 1")
    if not (clip_norm := config.optimizer.clip_norm) > 0:
        raise UserError(
            f"config.optimizer.clip_norm is {clip_norm}: it must be above 0; inf never clips"
        )
    for name, allowed in CHOICES.items():
        one_of(f"config.{name}", flat[name], allowed)
    for name in ("log_every", "eval_every", "checkpoint_every"):
        if config.updates_per_call > flat[name]:
            raise UserError(
                f"config.updates_per_call is {config.updates_per_call}: it must be at most "
                f"config.{name}, which is {flat[name]}"
            )
    for name in paths.FIELDS:
        if name in config:
            paths.expand(f"config.{name}", config[name])  # refuses invalid paths
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.wandb is {config.wandb}: the package wandb is not installed; pip install wandb"
        )
    model_kinds(config)
    check_batch_sizes(config)
