"""All that this repository uses of `jax.experimental`, whose names may change between versions."""

from jax.experimental import multihost_utils, rnn, topologies
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu

__all__ = [
    "Layout",
    "multihost_utils",
    "pl",
    "pltpu",
    "rnn",
    "topologies",
    "with_layout_constraint",
]
