"""Layer normalisation instead of batch normalisation: statistics of an example, not of a batch.

    python -m scripts.sweep --config=configs/digits.py \
        --sweep=configs/sweeps/ablation_layer_norm.py

It normalises the same terms, with the same initial gamma and with gamma 1, its usual value. Images
have one number per step, of whose input term layer normalisation keeps only the sign. Other points
therefore leave the input term unnormalised, and so does one of the two BN-LSTMs.
"""

from experiments.launching.sweeps import Fields, product, values

TERMS = (("input", "recurrent", "cell"), ("recurrent", "cell"))


def get_sweep() -> list[Fields]:
    """The points."""
    layer = product(
        [{"model.kind": "ln_lstm"}],
        values("model.initial_scale", 0.1, 1.0),
        values("model.normalize", *TERMS),
    )
    batch = [
        {"model.kind": "bn_lstm", "model.initial_scale": 0.1, "model.normalize": terms}
        for terms in TERMS
    ]
    return product(layer + batch, values("seed", 1, 2, 3))
