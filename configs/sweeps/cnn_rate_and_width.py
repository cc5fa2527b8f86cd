"""Learning rate and width of the CNN readers: the grid in the paper's appendix.

    python -m scripts.sweep --config=configs/cnn_qa.py:four_sentences \
        --sweep=configs/sweeps/cnn_rate_and_width.py --config.model.kind=bn_e_star_star
    python -m scripts.sweep --config=configs/cnn_qa.py:four_sentences \
        --sweep=configs/sweeps/cnn_rate_and_width.py --config.model.kind=lstm \
        --workdir=runs/sweeps/cnn_rate_and_width_lstm

The grid is the same for the LSTM and for the normalised readers. The paper trains LSTM, BN-LSTM and
BN-everywhere with learning rate 8e-5, BN-e* and BN-e** with 8e-4. Readers of four sentences have
240 units, BN-e** on whole passages has 120.
"""

from experiments.launching.sweeps import Fields, product, values


def get_sweep() -> list[Fields]:
    """The points."""
    return product(
        values("optimizer.learning_rate", 8e-3, 8e-4, 8e-5, 8e-6),
        values("model.features", 60, 120, 240, 280),
    )
