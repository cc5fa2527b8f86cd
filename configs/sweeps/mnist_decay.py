"""RMSProp's decay on sequential MNIST, permuted or not: the two values of the paper's appendix.

    python -m scripts.sweep --config=configs/mnist.py --sweep=configs/sweeps/mnist_decay.py
    python -m scripts.sweep --config=configs/pmnist.py --sweep=configs/sweeps/mnist_decay.py \
        --workdir=runs/sweeps/pmnist_decay

The paper speaks of momentum, its released code has none. The code has 0.5 as it was released, and
had 0.9 when the figures were made. Both models, of which the paper does not say which was searched.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(values("model.kind", "lstm", "bn_lstm"), values("optimizer.decay", 0.5, 0.9))
