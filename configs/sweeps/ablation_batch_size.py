"""Batches of 2 to 128 examples: how small a batch can be for batch statistics.

    python -m scripts.sweep --config=configs/digits.py --sweep=configs/sweeps/ablation_batch_size.py

All points make the same number of updates, so small batches see fewer examples: compare the BN-LSTM
with the LSTM at the same batch size. The paper uses batches of 40 to 128. Validation uses batch
statistics. The final results show batch and population statistics.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(
        values("batch_size", 2, 4, 8, 16, 32, 64, 128),
        values("model.kind", "lstm", "bn_lstm"),
        values("seed", 1, 2, 3),
    )
