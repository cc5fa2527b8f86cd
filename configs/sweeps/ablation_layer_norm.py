"""Layer normalisation instead of batch normalisation: statistics of an example, not of a batch.

    python -m scripts.sweep --config=configs/digits.py \
        --sweep=configs/sweeps/ablation_layer_norm.py

It normalises the same terms, with the same initial gamma and with its usual initial gamma, 1. An
image has one pixel per time step, so layer normalisation reduces the input term to the pixel's
sign. Half of the points, for both kinds of model, therefore leave the input term unnormalised.
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
