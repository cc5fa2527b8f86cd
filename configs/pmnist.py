"""Permuted sequential MNIST: the digit from 784 pixels in one random order for all images.

    python -m experiments.main --config=configs/pmnist.py --workdir=runs/pmnist_bn_lstm
    python -m experiments.main --config=configs/pmnist.py --workdir=runs/pmnist_lstm \
        --config.model.kind=lstm

By default the order is the one the paper's released code draws, with replacement: 501 of the 784
pixels are ever read. Most likely the paper's numbers are of this task. `configs/pmnist.py:true`
reads every pixel once, as the task is understood elsewhere. The orders are not comparable.
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
