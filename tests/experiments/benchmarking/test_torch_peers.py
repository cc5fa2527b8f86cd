"""The benchmark's BN-LSTM in PyTorch computes what `bnlstm_jax.BNLSTM` computes."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from bnlstm_jax import BNLSTM

BATCH, TIME, FEATURES, SYMBOLS = 6, 5, 4, 7

# Single precision. The first recurrent term is equal in all rows. Rounding moves PyTorch's batch
# mean of it by 6e-8, and division by sqrt(epsilon) enlarges that to 2e-5. Standard deviations are
# not small in the few steps that follow.
SINGLE = dict(rtol=0, atol=1e-4)


@pytest.fixture
def peers():
    pytest.importorskip("torch", reason="PyTorch is not installed: only benchmarks compare with it")
    from experiments.benchmarking import torch_peers

    return torch_peers


def draw_variables(layer, x, rng):
    """The initial variables of a layer plus noise."""
    variables = layer.init(jax.random.key(0), x)
    return jax.tree.map(lambda v: v + 0.5 * rng.normal(size=v.shape).astype(np.float32), variables)


def copied(peers, variables, inputs, **options):
    """The PyTorch layer with the variables of our layer."""
    import torch

    layer = peers.BNLSTM(FEATURES, inputs, TIME, **options)
    values = variables["params"] | variables["batch_stats"]
    layer.load_state_dict({name: torch.tensor(np.asarray(v)) for name, v in values.items()})
    return layer


@pytest.mark.parametrize("inputs, symbols", [(1, False), (3, False), (SYMBOLS, True)])
def test_eager_torch_bn_lstm_matches_jax(peers, inputs, symbols):
    import torch

    rng = np.random.default_rng(1)
    x = rng.normal(size=(BATCH, TIME, inputs)).astype(np.float32)
    if symbols:
        x = rng.integers(inputs, size=(BATCH, TIME))
    vocab_size = inputs if symbols else None
    layer = BNLSTM(FEATURES, max_steps=TIME, vocab_size=vocab_size, use_running_average=False)
    variables = draw_variables(layer, x, rng)
    y, updated = layer.apply(variables, x, mutable=["batch_stats"])
    eager = copied(peers, variables, inputs, symbols=symbols)
    with torch.no_grad():
        np.testing.assert_allclose(eager(torch.tensor(x)), y, **SINGLE)
    assert np.std(y) > 0.1  # outputs vary
    for term in ("input", "recurrent", "cell"):  # means only: PyTorch's variances are unbiased
        name = f"{term}_mean"
        np.testing.assert_allclose(getattr(eager, name), updated["batch_stats"][name], **SINGLE)


def test_masked_torch_bn_lstm_matches_jax_in_both_directions(peers):
    import torch

    rng = np.random.default_rng(2)
    x = rng.normal(size=(BATCH, TIME, 3)).astype(np.float32)
    lengths = np.array([5, 2, 3, 5, 1, 4])
    layers = (
        BNLSTM(FEATURES, max_steps=TIME, mask_statistics=False, use_running_average=False)
        for _ in range(2)
    )
    layer = nn.Bidirectional(*layers)
    variables = draw_variables(layer, x, rng)
    y, _ = layer.apply(variables, x, seq_lengths=lengths, mutable=["batch_stats"])
    for name, part in zip(("forward_rnn", "backward_rnn"), np.split(y, 2, -1), strict=True):
        own = {collection: values[name] for collection, values in variables.items()}
        eager = copied(peers, own, 3, reverse=name == "backward_rnn")
        with torch.no_grad():
            found = eager(torch.tensor(x), torch.tensor(lengths))
        np.testing.assert_allclose(found, part, err_msg=name, **SINGLE)
