"""RMSProp's decay on sequential MNIST, permuted or not: the two values of the paper's appendix.

    python -m scripts.sweep --config=configs/mnist.py --sweep=configs/sweeps/mnist_decay.py
    python -m scripts.sweep --config=configs/pmnist.py --sweep=configs/sweeps/mnist_decay.py \
        --workdir=runs/sweeps/pmnist_decay

The paper mentions momentum, which its released code does not have. The released code has decay 0.5;
it had 0.9 when the figures were made. The paper does not say which model the search used, so this
sweep has both.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(values("model.kind", "lstm", "bn_lstm"), values("optimizer.decay", 0.5, 0.9))
