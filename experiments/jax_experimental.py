"""The imports from `jax.experimental` that experiments and tests use; the library has its own."""

from jax.experimental import multihost_utils, rnn, topologies

__all__ = ["multihost_utils", "rnn", "topologies"]
