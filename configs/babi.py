"""bAbI (Weston et al., 2015) in the format of the CNN questions, for the five readers.

    python -m experiments.main --config=configs/babi.py --workdir=runs/babi
    python -m experiments.main --config=configs/babi.py:qa1 --workdir=runs/babi_1

The variant names the task. qa1 and qa2 ask where a person or thing is, with one or two supporting
facts; qa4 and qa5 ask about relations with two or three arguments. Each task has 9,000 training
questions. Seven in ten of qa4's validation and test questions are also training questions. Trains
all five readers on a laptop. Not in the paper. Validation error of qa2 after 2,000 updates, ranked
as in the paper: LSTM 0.6, BN-LSTM 0.54, BN-e** 0.51 (with Adam's epsilon as published).
"""

from ml_collections import ConfigDict

from experiments.config import READER_KINDS, base_config
from experiments.tasks.question_answering import reader_config


def get_config(subset: str = "qa2") -> ConfigDict:
    """The config; `subset` is the task: `qa1`, `qa2`, `qa4` or `qa5`."""
    config = reader_config(base_config())
    config.dataset = "babi"
    config.subset = subset
    config.sorted_batches = 12
    config.batch_size = 64
    config.num_updates = 2000
    config.model.kind = ",".join(READER_KINDS)
    config.model.features = 64
    config.model.dropout_rate = 0.1
    config.optimizer.name = "adam"
    config.optimizer.adam_epsilon = "released"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.clip_norm = 10.0
    config.optimizer.clip_rule = "released_reader"
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint_every = 100
    config.eval_batch_size = 200
    config.population_batch_size = 64
    config.population_late_steps = "repeat"
    return config
