"""Your own text, any UTF-8 file, character by character.

    python -m experiments.main --config=configs/text.py --config.text_file=book.txt

The first 90% are for training, the next 5% for validation, the last 5% for testing
(`--config.split`). The symbols are the characters of the training text, and one more for all other
characters of the validation and test text, which the model never learns to predict.
"""

from ml_collections import ConfigDict

from experiments.config import base_config
from experiments.tasks.char_lm import text_config


def get_config() -> ConfigDict:
    """The config."""
    config = text_config(base_config())
    config.dataset = "text"
    config.batch_size = 32
    config.num_updates = 2000
    config.model.kind = "bn_lstm"
    config.model.features = 200
    config.model.momentum = 0.95
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.log_every = 20
    config.eval_every = 200
    config.checkpoint_every = 200
    config.eval_batch_size = 100
    config.population_batch_size = 100
    return config
