"""Population statistics of all time steps together, in place of one for each.

    python -m scripts.sweep --config=configs/digits.py \
        --sweep=configs/sweeps/ablation_shared_statistics.py

Training and validation, which have statistics of the batch, are the same: what differs is the last
table, with population statistics. The paper says that averaging over time hurts, without numbers.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(
        values("model.kind", "bn_lstm"),
        values("model.shared_statistics", False, True),
        values("seed", 1, 2, 3),
    )
