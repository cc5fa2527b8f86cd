"""The models that the paper's experiments train, made of the layers of `bnlstm_jax`."""
