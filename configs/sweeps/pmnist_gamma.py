"""The initial gamma of BN-LSTM on permuted MNIST, as in the paper's figure on gamma.

    python -m scripts.sweep --config=configs/pmnist.py --sweep=configs/sweeps/pmnist_gamma.py

The paper plots cross-entropy with batch statistics over the first 50,000 updates
(`--config.num_updates=50000`). Best validation cross-entropy there: 0.194 for 0.1, 0.222 for 0.3,
0.265 for 0.5, 0.299 for 0.7, 0.465 for 1.0. It shows one run per gamma; seed 1 is the released
code's default. Add seeds to see how much runs differ: points may be added to a sweep later.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(values("model.initial_scale", 0.1, 0.3, 0.5, 0.7, 1.0), values("seed", 1))
