"""All that experiments and tests use of `jax.experimental`, beside what the library uses."""

from jax.experimental import multihost_utils, rnn, topologies

__all__ = ["multihost_utils", "rnn", "topologies"]
