"""How small a batch may be whose statistics normalise: 2 to 128 examples, with and without them.

    python -m scripts.sweep --config=configs/digits.py --sweep=configs/sweeps/ablation_batch_size.py

All points make the same number of updates, so that small batches see fewer examples: hold BN-LSTM
against the LSTM with the same batches. The paper has batches of 100, 64 and 128, and no others.
The last table tells batch statistics, which validation has, from population statistics.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(
        values("batch_size", 2, 4, 8, 16, 32, 64, 128),
        values("model.kind", "lstm", "bn_lstm"),
        values("seed", 1, 2, 3),
    )
