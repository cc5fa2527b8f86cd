"""The initial gammas of the paper's figure on gamma, on the digits: minutes on a laptop.

    python -m scripts.sweep --config=configs/digits.py --sweep=configs/sweeps/digits_gamma.py \
        --config.model.kind=bn_lstm

The paper compares these gammas on other data. Here each has three seeds.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(values("model.initial_scale", 0.1, 0.3, 0.5, 0.7, 1.0), values("seed", 1, 2, 3))
