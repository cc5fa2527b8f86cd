"""Sequential MNIST: a digit is classified from its 784 pixels in order, one per time step.

    python -m experiments.main --config=configs/mnist.py --workdir=runs/mnist_bn_lstm
    python -m experiments.main --config=configs/mnist.py --workdir=runs/mnist_lstm \
        --config.model.kind=lstm

Paper, test accuracy: LSTM 0.989, BN-LSTM 0.990. An update of the layer takes 95 ms on two CPU
cores with AVX-512 (2.6 hours for 100,000) and 9 ms on an H100 (15 minutes); docs/speed.md.

The settings are those of the paper's released code, except RMSProp's decay: 0.9 instead of 0.5
(`--config.optimizer.decay=0.5`), because 0.9 is closer to the paper's curves of permuted MNIST
(results/findings.md).
"""

from ml_collections import ConfigDict

from experiments.config import base_config
from experiments.tasks.sequential_images import image_config


def get_config() -> ConfigDict:
    """The config."""
    config = image_config(base_config())
    config.batch_size = 100
    config.num_updates = 100_000
    config.model.kind = "bn_lstm"
    config.model.features = 100
    config.model.recurrent_init = "identity"
    # The first pixels are black in every image. Without noise, batch variances would be zero there.
    config.model.initial_hidden_noise = 0.1
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.decay = 0.9
    config.optimizer.clip_norm = 1.0
    config.eval_every = 500
    config.checkpoint_every = 500
    config.eval_batch_size = 1000
    config.population_batch_size = 5000
    return config
