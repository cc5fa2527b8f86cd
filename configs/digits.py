"""Permuted 8x8 digits: LSTM and BN-LSTM in less than a minute on a laptop, without a download.

    python -m experiments.main --config=configs/digits.py

Handwritten digits that ship with scikit-learn, read one pixel per time step in a random order: 64
steps, 1,297 training, 250 validation and 250 test images. Trains both models, one after the other.
Not in the paper. Validation accuracy: LSTM 0.3 to 0.4, BN-LSTM about 0.7.
"""

from ml_collections import ConfigDict

from experiments.config import base_config
from experiments.tasks.sequential_images import image_config


def get_config() -> ConfigDict:
    """The config."""
    config = image_config(base_config())
    config.dataset = "digits"
    config.pixel_order = "permutation"
    config.batch_size = 64
    config.num_updates = 600
    config.model.kind = "lstm,bn_lstm"
    config.model.features = 64
    config.model.recurrent_init = "identity"
    config.model.momentum = 0.9  # running averages with 0.99 are too slow for 600 updates
    config.log_every = 20
    config.eval_every = 50
    config.checkpoint_every = 100
    config.eval_batch_size = 250
    config.population_batch_size = 1297
    return config
