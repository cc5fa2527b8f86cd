"""Layers under flax.nnx: the same values as under flax.linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bnlstm_jax import BNLSTM, LNLSTM, LSTM

X = jax.random.normal(jax.random.key(1), (6, 5, 3))
LAYERS = [LSTM(4), LNLSTM(4), BNLSTM(4, max_steps=5)]
IDS = [type(layer).__name__ for layer in LAYERS]


def converted(layer):
    """The layer as an NNX module, and its variables in Linen's format."""
    module = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(X, use_running_average=True)
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    states = {name: nnx.to_pure_dict(nnx.state(module, kind)) for name, kind in kinds.items()}
    return module, {name: state for name, state in states.items() if state}


def assert_equal(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), actual, expected)


@pytest.mark.parametrize("layer", LAYERS, ids=IDS)
def test_nnx_training_matches_linen(layer):
    module, variables = converted(layer)
    kwargs = {"use_running_average": False, "mutable": ["batch_stats"]}

    def loss_of(outputs):
        return jnp.sum(jnp.sin(outputs))

    def linen_loss(params):
        outputs, updated = layer.apply({**variables, "params": params}, X, **kwargs)
        return loss_of(outputs), updated

    (loss, updated), gradients = jax.value_and_grad(linen_loss, has_aux=True)(variables["params"])
    found, found_gradients = nnx.value_and_grad(lambda m: loss_of(m(X, **kwargs)))(module)
    assert found == loss
    assert_equal(nnx.to_pure_dict(found_gradients), gradients)
    statistics = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    assert_equal(statistics, dict(updated.get("batch_stats", {})))
    assert_equal(module(X, use_running_average=True), layer.apply(
        {**variables, **updated}, X, use_running_average=True
    ))  # fmt: skip


class Stacked(nnx.Module):
    """Two layers and a read-out, written as a user of NNX would."""

    def __init__(self, rngs):
        first, second = nn.RNN(nn.LSTMCell(4)), BNLSTM(4, max_steps=5)
        self.first = nnx.bridge.ToNNX(first, rngs=rngs).lazy_init(X)
        self.second = nnx.bridge.ToNNX(second, rngs=rngs)
        self.second.lazy_init(self.first(X), use_running_average=True)
        self.readout = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, train):
        mutable = ["batch_stats"] if train else False
        h = self.second(self.first(x), use_running_average=not train, mutable=mutable)
        return self.readout(h[:, -1])


def test_nnx_model_trains():
    model = Stacked(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.03), wrt=nnx.Param)
    labels = jnp.arange(len(X)) % 2

    @nnx.jit
    def update(model, optimizer):
        def loss_of(model):
            logits = model(X, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [update(model, optimizer) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert model(X[:1], train=False).shape == (1, 2)
    assert np.abs(model.second.recurrent_mean.get_value()).max() > 0
