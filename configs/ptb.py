"""Penn Treebank, character by character: 50 symbols, segments of 100, 791 updates per epoch.

    python -m experiments.main --config=configs/ptb.py --workdir=runs/ptb_bn_lstm
    python -m experiments.main --config=configs/ptb.py --workdir=runs/ptb_lstm \
        --config.model.kind=lstm

Paper, test text as one sequence: LSTM 1.38, BN-LSTM 1.32 bits per character, from the checkpoint
with the best validation accuracy. Here, after ten epochs: LSTM 1.387, BN-LSTM 1.327
(results/findings.md). An update of the layer takes 0.36 s on two CPU cores with AVX-512: 3.9 hours
for all 50 epochs.

`configs/ptb.py:small` has 200 units instead of 1,000 and trains both models for five epochs. Here,
with Adam's epsilon as published: LSTM 1.87, BN-LSTM 1.56.
"""

from ml_collections import ConfigDict

from experiments.config import base_config
from experiments.runtime.checks import one_of
from experiments.tasks.char_lm import text_config

UPDATES_PER_EPOCH = 791


def get_config(variant: str = "paper") -> ConfigDict:
    """The config; `variant` is `paper` or `small`."""
    one_of("the variant of configs/ptb.py", variant, ("paper", "small"))
    config = text_config(base_config())
    config.dataset = "ptb"
    config.split = ()
    config.segment_length = 100
    config.eval_lengths = tuple(range(100, 1001, 100))
    config.selection = "accuracy"
    config.batch_size = 64
    config.num_updates = 50 * UPDATES_PER_EPOCH
    config.model.kind = "bn_lstm"
    config.model.features = 1000
    config.model.momentum = 0.95
    config.optimizer.name = "adam"
    config.optimizer.adam_epsilon = "released"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.clip_norm = 1.0
    config.log_every = 20
    config.eval_every = UPDATES_PER_EPOCH
    config.checkpoint_every = UPDATES_PER_EPOCH
    config.eval_batch_size = 100
    config.population_batch_size = 100
    if variant == "small":
        config.model.kind = "lstm,bn_lstm"
        config.model.features = 200
        config.num_updates = 5 * UPDATES_PER_EPOCH
    return config
