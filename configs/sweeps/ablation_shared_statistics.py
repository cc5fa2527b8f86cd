"""Population statistics shared by all time steps, instead of statistics per time step.

    python -m scripts.sweep --config=configs/digits.py \
        --sweep=configs/sweeps/ablation_shared_statistics.py

Training and validation use batch statistics, and are the same with both values. Final results with
population statistics differ. The paper says that averaging over time hurts, without numbers.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(
        values("model.kind", "bn_lstm"),
        values("model.shared_statistics", False, True),
        values("seed", 1, 2, 3),
    )
