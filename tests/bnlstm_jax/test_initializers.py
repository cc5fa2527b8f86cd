import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax import initializers

H = 12


def test_semi_orthogonal_applies_to_the_whole_kernel():
    wide = initializers.semi_orthogonal()(jax.random.key(0), (H, 4 * H))
    tall = initializers.semi_orthogonal()(jax.random.key(0), (4 * H, H))
    np.testing.assert_allclose(wide @ wide.T, np.eye(H), atol=1e-5)
    np.testing.assert_allclose(tall.T @ tall, np.eye(H), atol=1e-5)
    block = wide[:, :H]
    assert np.abs(block @ block.T - np.eye(H)).max() > 0.1


def test_identity_block_initialises_the_candidate():
    kernel = initializers.identity_block()(jax.random.key(0), (H, 4 * H))
    np.testing.assert_array_equal(kernel[:, 3 * H :], np.eye(H))
    gates = kernel[:, : 3 * H]
    np.testing.assert_allclose(gates @ gates.T, np.eye(H), atol=1e-5)
    with pytest.raises(ValueError, match="4H"):
        initializers.identity_block()(jax.random.key(0), (H, H))


def test_layer_initialisation_matches_the_paper():
    layer = bnlstm_jax.BNLSTM(H, max_steps=2)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 2, 3)), use_running_average=True)["params"]
    forget, others = params["bias"][:H], params["bias"][H:]
    assert np.all(forget == 1) and np.all(others == 0)
    for name in ("input_scale", "recurrent_scale", "cell_scale"):
        assert np.all(params[name] == np.float32(0.1)), name
    for name in ("cell_bias", "initial_hidden", "initial_cell"):
        assert np.all(params[name] == 0), name


@pytest.mark.parametrize("name", ["LSTM", "BNLSTM", "LNLSTM"])
def test_cells_have_the_defaults_of_their_layers(name):
    options = {"use_running_average": True} if name == "BNLSTM" else {}
    layer, cell = (getattr(bnlstm_jax, kind)(H, **options) for kind in (name, f"{name}Cell"))
    inputs = jnp.zeros((2, 3, 3))
    rnn = nn.RNN(cell, variable_axes={"batch_stats": 0})
    of_layer, others = (layer.init(jax.random.key(seed), inputs) for seed in (0, 1))
    of_cell = rnn.init(jax.random.key(0), inputs)
    assert set(of_layer) == set(of_cell)
    constant = 0
    for collection, leaves in of_layer.items():
        for path, leaf in leaves.items():
            theirs = of_cell[collection]["cell"][path]
            if np.array_equal(leaf, others[collection][path]):  # not random
                expected = leaf[:3] if collection == "batch_stats" else leaf
                np.testing.assert_array_equal(theirs, expected, err_msg=path)
                constant += 1
    assert constant >= 2
    for path in ("input_kernel", "recurrent_kernel"):  # semi-orthogonal as a whole
        kernel = of_cell["params"]["cell"][path]
        rows = min(kernel.shape)
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(rows), atol=1e-5, err_msg=path)
    for field in {"momentum", "epsilon", "normalize"} & vars(layer).keys() & vars(cell).keys():
        assert getattr(layer, field) == getattr(cell, field), field


def test_other_modules_have_the_documented_defaults():
    norm = bnlstm_jax.BatchNorm()
    assert (norm.momentum, norm.epsilon) == (0.99, 1e-5)
    params = norm.init(jax.random.key(0), jnp.ones((2, H)), use_running_average=True)["params"]
    assert np.all(params["scale"] == np.float32(0.1))
    cell = bnlstm_jax.BNSimpleCell(H, use_running_average=True)
    assert (cell.momentum, cell.epsilon) == (0.99, 1e-5)
    rnn = nn.RNN(cell, variable_axes={"batch_stats": 0})
    params = rnn.init(jax.random.key(0), jnp.zeros((2, 3, 3)))["params"]["cell"]
    assert np.all(params["joint_scale"] == np.float32(0.1))


def test_initial_noise_has_given_deviation_and_depends_on_key():
    layer = bnlstm_jax.LSTM(50, initial_hidden_noise=0.1)
    x = jnp.zeros((200, 1, 3))
    variables = layer.init(jax.random.key(0), x)
    frozen = {**variables["params"], "recurrent_kernel": jnp.tile(jnp.eye(50), (1, 4))}
    frozen |= {"bias": jnp.zeros(200)}
    # With these parameters h_1 = sigmoid(h_0) tanh(sigmoid(h_0) tanh(h_0)), one-to-one in h_0.
    grid = np.linspace(-1, 1, 20001)
    s = 1 / (1 + np.exp(-grid))
    h_1 = layer.apply({"params": frozen}, x, rngs={"noise": jax.random.key(1)})
    h_0 = np.interp(h_1.ravel(), s * np.tanh(s * np.tanh(grid)), grid)
    # 10,000 draws: the standard error of the deviation is 0.7%, of the mean 0.001.
    assert abs(h_0.std() - 0.1) < 0.003 and abs(h_0.mean()) < 0.004
    same = layer.apply({"params": frozen}, x, rngs={"noise": jax.random.key(1)})
    other = layer.apply({"params": frozen}, x, rngs={"noise": jax.random.key(2)})
    np.testing.assert_array_equal(h_1, same)
    assert np.any(h_1 != other)
