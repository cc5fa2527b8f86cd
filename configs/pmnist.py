"""Permuted sequential MNIST: the 784 pixels in a random order, the same for all images.

    python -m experiments.main --config=configs/pmnist.py --workdir=runs/pmnist_bn_lstm
    python -m experiments.main --config=configs/pmnist.py --workdir=runs/pmnist_lstm \
        --config.model.kind=lstm

Paper, test accuracy: LSTM 0.902, BN-LSTM 0.954. Here: 0.899 and 0.952. For the run time see
configs/mnist.py.

The default order comes from the paper's released code, which draws pixels with replacement and so
reads 501 of the 784. The paper's numbers most likely use this order. `configs/pmnist.py:true` reads
every pixel once, the usual definition of the task. Results of the two orders are not comparable.
"""

from ml_collections import ConfigDict

from configs import mnist
from experiments.runtime.checks import one_of

VARIANTS = {"released": "released_draw", "true": "permutation"}


def get_config(variant: str = "released") -> ConfigDict:
    """The config; `variant` is `released` or `true`."""
    one_of("the variant of configs/pmnist.py", variant, tuple(VARIANTS))
    config = mnist.get_config()
    config.pixel_order = VARIANTS[variant]
    config.model.initial_hidden_noise = 0.0
    return config
