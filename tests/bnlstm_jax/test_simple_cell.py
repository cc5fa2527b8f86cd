import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bnlstm_jax

B, T, D, H = 6, 5, 2, 4


def loop(params, x, statistics=None):
    """The normalised tanh RNN in NumPy: outputs [B, T, H], and statistics, each [T, H]."""
    h = np.broadcast_to(params["initial_hidden"], (len(x), H))
    outputs, means, variances = [], [], []
    for t in range(x.shape[1]):
        a = h @ params["recurrent_kernel"] + x[:, t] @ params["input_kernel"]
        mean, var = (a.mean(0), a.var(0)) if statistics is None else (s[t] for s in statistics)
        h = np.tanh(params["joint_scale"] * (a - mean) / np.sqrt(var + 1e-5) + params["bias"])
        outputs.append(h), means.append(mean), variances.append(var)
    return np.stack(outputs, 1), (np.stack(means), np.stack(variances))


def test_training_and_inference_match_a_numpy_loop():
    random = np.random.default_rng(0)
    x = random.normal(size=(B, T, D)).astype(np.float32)
    layers = {
        running: nn.RNN(
            bnlstm_jax.BNSimpleCell(H, momentum=0.0, use_running_average=running),
            variable_axes={"batch_stats": 0},
        )
        for running in (False, True)
    }
    variables = layers[False].init(jax.random.key(0), x)
    params = {
        name: random.normal(size=value.shape).astype(np.float32)
        for name, value in variables["params"]["cell"].items()
    }
    variables = {**variables, "params": {"cell": params}}

    outputs, updated = layers[False].apply(variables, x, mutable=["batch_stats"])
    wanted, (mean, var) = loop(params, x)
    statistics = updated["batch_stats"]["cell"]
    # Float32 against float64 over five steps of order 1, the first with little variance.
    np.testing.assert_allclose(outputs, wanted, atol=2e-5)
    np.testing.assert_allclose(statistics["joint_mean"], mean, atol=1e-5)
    np.testing.assert_allclose(statistics["joint_var"], var, rtol=1e-4)

    given = {"joint_mean": mean[::-1], "joint_var": var[::-1]}
    inference = layers[True].apply({**variables, "batch_stats": {"cell": given}}, x)
    wanted, _ = loop(params, x, (given["joint_mean"], given["joint_var"]))
    np.testing.assert_allclose(inference, wanted, atol=2e-5)


def test_variables_have_expected_names_and_shapes():
    cell = bnlstm_jax.BNSimpleCell(H)
    variables = cell.init(
        jax.random.key(0), jnp.zeros((B, H)), jnp.zeros((B, D)), use_running_average=False
    )
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {
            "input_kernel": (D, H),
            "recurrent_kernel": (H, H),
            "bias": (H,),
            "joint_scale": (H,),
            "initial_hidden": (H,),
        },
        "batch_stats": {"joint_mean": (H,), "joint_var": (H,)},
    }
