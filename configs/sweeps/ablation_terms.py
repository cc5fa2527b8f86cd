"""Which of the three terms must be normalised: each alone, each pair, and all of them.

    python -m scripts.sweep --config=configs/digits.py --sweep=configs/sweeps/ablation_terms.py
    python -m scripts.sweep --config=configs/pmnist.py --sweep=configs/sweeps/ablation_terms.py \
        --workdir=runs/sweeps/pmnist_terms --config.num_updates=10000

`input` is W_x x_t, `recurrent` is W_h h_{t-1}, `cell` is the argument of the output's tanh. The
paper normalises all three and shows no other choice. One more point takes input statistics over
whole sequences, as the paper's readers BN-e* and BN-e** do.
"""

from experiments.launching.sweeps import Fields, product, values

TERMS = (
    ("input", "recurrent", "cell"),
    ("input",),
    ("recurrent",),
    ("cell",),
    ("input", "recurrent"),
    ("input", "cell"),
    ("recurrent", "cell"),
)


def get_sweep() -> list[Fields]:
    """The points."""
    terms = values("model.normalize", *TERMS)
    whole_sequences = [{"model.normalize": TERMS[0], "model.input_statistics": "sequence"}]
    return product(
        values("model.kind", "bn_lstm"), terms + whole_sequences, values("seed", 1, 2, 3)
    )
