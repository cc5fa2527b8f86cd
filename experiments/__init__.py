"""Experiments: data, tasks, training and evaluation around the `bnlstm_jax` library."""
