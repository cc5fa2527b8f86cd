"""All that the library uses of `jax.experimental`, whose names may change between versions."""

from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu

__all__ = ["Layout", "pl", "pltpu", "with_layout_constraint"]
