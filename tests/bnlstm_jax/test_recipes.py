"""The code in docs/layer.md runs as it stands, and gives the right numbers."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax import BNLSTM, BNLSTMCell, estimate_population_statistics

PAGE = (Path(__file__).parents[2] / "docs" / "layer.md").read_text(encoding="utf-8")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def run(word, **names):
    """Runs the Python example that has a word in it; returns its names."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if word in c)
    library = {"nn": nn, "jax": jax, "jnp": jnp, **vars(bnlstm_jax)}
    exec(code, found := {**library, **names})
    return found


def draw(*shape):
    return jax.random.normal(jax.random.key(1), shape)


@pytest.fixture(scope="module")
def trained():
    """Variables of a layer whose statistics differ between time steps, and inputs."""
    layer, x = BNLSTM(64, max_steps=50), draw(8, 6, 3)
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    statistics = estimate_population_statistics(layer, variables, [x], use_running_average=False)
    return {**variables, "batch_stats": statistics}, x


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)


def test_training_loop_learns_and_re_estimates():
    x, lengths = draw(16, 9, 3), jnp.arange(16) % 6 + 4
    labels = (x[:, 0, 0] > 0).astype(int)
    found = run("TrainState", batches=[(x, lengths, labels)] * 30)
    assert found["state"].step == 30 and found["loss"] < 0.5  # log 2 by chance
    expected = estimate_population_statistics(
        found["model"], found["variables"], [(x, lengths)], train=True
    )
    assert_close(found["population"], expected)
    assert found["logits"].shape == (16, 2)


def test_decoding_in_pieces_matches_the_whole_sequence(trained):
    variables, x = trained
    found = run("def read", variables=variables, x=x)
    expected = BNLSTM(64, max_steps=50).apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(found["outputs"], expected, **CLOSE)


@pytest.mark.parametrize("devices", [1, None], ids=["one", "all"])
def test_gradients_and_statistics_over_devices_match_one_device(trained, devices, monkeypatch):
    if devices is not None:
        one = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        monkeypatch.setattr(jax, "make_mesh", lambda *_: one)
    variables, _ = trained
    x = draw(2 * jax.device_count(), 6, 3)
    found = run("jax.lax.pmean", variables=variables, x=x)
    alone = BNLSTM(64, max_steps=50, use_running_average=False)

    def loss_of(params):
        y, updated = alone.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.mean(y**2), updated

    expected = jax.grad(loss_of, has_aux=True)(variables["params"])
    assert_close((found["gradients"], found["updated"]), expected)

    found = run("over_devices", **{name: found[name] for name in ("P", "mesh", "layer", "x")},
                variables=variables)  # fmt: skip
    assert_close(found["population"], estimate_population_statistics(alone, variables, [x]))


def test_weight_decay_mask_has_the_kernels_alone(trained):
    import optax

    variables, _ = trained
    found = run("def kernels", optax=optax)
    decayed = {name for name, kept in found["kernels"](variables["params"]).items() if kept}
    assert decayed == {"input_kernel", "recurrent_kernel"}
    found["optimizer"].init(variables["params"])


def test_cells_take_the_statistics_of_layers(trained):
    variables, x = trained
    params, batch_stats = variables["params"], variables["batch_stats"]
    one, several = re.findall(r"`(jax\.tree\.map\(lambda rows: .*?, batch_stats\))`", PAGE)
    cell = BNLSTMCell(64, use_running_average=True)
    layer = BNLSTM(64, max_steps=50, use_running_average=True, return_carry=True)
    whole = layer.apply(variables, x)[1]

    names = {"jax": jax, "jnp": jnp, "batch_stats": batch_stats}
    carry = layer.apply(variables, x[:, :0])[0]
    for t in range(3):
        statistics = eval(one, {**names, "t": t})
        carry, y = cell.apply({"params": params, "batch_stats": statistics}, carry, x[:, t])
        np.testing.assert_allclose(y, whole[:, t], **CLOSE)

    rnn = nn.RNN(cell, variable_axes={"batch_stats": 0, "current_batch_stats": 0})
    for steps in (3, 6):
        statistics = eval(several, {**names, "steps": steps})
        nested = {"params": {"cell": params}, "batch_stats": {"cell": statistics}}
        y = rnn.apply(nested, x[:, :steps])
        np.testing.assert_allclose(y, whole[:, :steps], **CLOSE)


def test_flax_weights_are_converted():
    x = draw(3, 5, 2)
    for cell in (nn.LSTMCell(100), nn.OptimizedLSTMCell(100)):
        rnn = nn.RNN(cell)
        variables = rnn.init(jax.random.key(0), x)
        variables = {"params": {"cell": variables["params"]["cell"]}}
        found = run("theirs =", variables=variables, x=x)
        np.testing.assert_allclose(found["y"], rnn.apply(variables, x), **CLOSE)


def test_remat_takes_fields(trained):
    variables, x = trained
    layer = nn.remat(BNLSTM)(64, max_steps=50, use_running_average=False)
    expected = BNLSTM(64, max_steps=50, use_running_average=False)
    got, wanted = (each.apply(variables, x, mutable=["batch_stats"]) for each in (layer, expected))
    assert_close(got, wanted)
