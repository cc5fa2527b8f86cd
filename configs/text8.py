"""text8, character by character: 27 symbols, segments of 180, 3,907 updates per epoch.

    python -m experiments.main --config=configs/text8.py --workdir=runs/text8_bn_lstm
    python -m experiments.main --config=configs/text8.py --workdir=runs/text8_lstm \
        --config.model.kind=lstm

Paper, test text as one sequence: LSTM 1.43, BN-LSTM 1.36 bits per character, with the split
90M / 5M / 5M. An update of the layer takes 5.3 s on two CPU cores: all 50 epochs need a GPU.

Results of another split are not comparable with the paper's; the name of the data states the split:

    --config.split="(1_000_000, 50_000, 50_000)"     the first 1.1 million characters
"""

from ml_collections import ConfigDict

from experiments.config import base_config
from experiments.tasks.char_lm import text_config

UPDATES_PER_EPOCH = 3907


def get_config() -> ConfigDict:
    """The config."""
    config = text_config(base_config())
    config.dataset = "text8"
    config.split = (90_000_000, 5_000_000, 5_000_000)
    config.segment_length = 180
    config.selection = "accuracy"
    config.batch_size = 128
    config.num_updates = 50 * UPDATES_PER_EPOCH
    config.model.kind = "bn_lstm"
    config.model.features = 2000
    config.model.momentum = 0.95
    config.optimizer.name = "adam"
    config.optimizer.adam_epsilon = "released"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.clip_norm = 1.0
    config.log_every = 20
    config.eval_every = UPDATES_PER_EPOCH
    config.checkpoint_every = 500
    config.eval_batch_size = 128
    config.population_batch_size = 1000  # a `[179, 1000, 8000]` float32 array is 5.7 GB
    return config
