"""The initial gamma of BN-LSTM on Penn Treebank, as in the paper's figure on gamma.

    python -m scripts.sweep --config=configs/ptb.py --sweep=configs/sweeps/ptb_gamma.py

The paper plots training and validation with batch statistics. Its axes say bits but show nats, and
their updates are too many by the factor 1 / ln 2. After conversion the figure ends at update 13,170
(`--config.num_updates=13200` is enough), with best validation bits per character 1.469 for 0.1 and
0.3, 1.468 for 0.5 and 0.7, 1.466 for 1.0. The paper shows one run per gamma; seed 1 is the released
code's default. Points may be added to a sweep later.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(values("model.initial_scale", 0.1, 0.3, 0.5, 0.7, 1.0), values("seed", 1))
