"""Layers on the explicit mesh that `jax.make_mesh` makes by default, and in `jax.shard_map`."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import bnlstm_jax
from bnlstm_jax import BNLSTM, LNLSTM, LSTM, BatchNorm
from bnlstm_jax.recurrence.devices import emulation

# Sums over two devices round differently from sums on one device.
CLOSE = dict(rtol=1e-5, atol=2e-6)
MODULES = {
    "BatchNorm": BatchNorm(),
    "BNLSTM": BNLSTM(4),
    "BNLSTM, reversed": BNLSTM(4, reverse=True, keep_order=True, return_carry=True),
    "BNLSTM, reference": BNLSTM(4, implementation="reference", input_statistics="sequence"),
    "BNLSTM, symbols": BNLSTM(4, vocab_size=5),
    "LSTM": LSTM(4),
    "LNLSTM": LNLSTM(4),
}
CASES = [(name, training) for name in MODULES for training in (True, False) if "BN" in name]
CASES += [("BatchNorm", True), ("BatchNorm", False), ("LSTM", None), ("LNLSTM", None)]


def draw(name):
    """A module, the arguments of its call, and its variables."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32)
    inputs = {"x" if name == "BatchNorm" else "inputs": x}
    if "symbols" in name:
        inputs = {"inputs": jnp.asarray(rng.integers(0, 5, (4, 3)), jnp.int32)}
    if "reversed" in name:
        inputs["seq_lengths"] = jnp.array([3, 1, 2, 3], jnp.int32)
    module = MODULES[name]
    return module, inputs, module.init(jax.random.key(0), **inputs, use_running_average=True)


def results(module, variables, inputs, training):
    """Outputs, updated statistics, and gradients by parameters and inputs."""
    use = {} if training is None else {"use_running_average": not training}
    floats = {name: x for name, x in inputs.items() if x.dtype == jnp.float32}

    def loss(params, floats):
        outputs, updated = module.apply(
            {**variables, "params": params}, **{**inputs, **floats}, **use, mutable=["batch_stats"]
        )
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(outputs)), (outputs, updated)

    return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], floats)


@pytest.mark.parametrize("place", ["whole", "sharded"])
@pytest.mark.parametrize("name, training", CASES)
def test_results_on_explicit_mesh_match_one_device(name, training, place):
    module, inputs, variables = draw(name)

    @jax.jit
    def run(variables, inputs):
        return results(module, variables, inputs, training)

    wanted = run(variables, inputs)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def put_variable(x):
        divisible = place == "sharded" and x.shape[-1] % 2 == 0
        return put(x, *([None] * (x.ndim - 1) + ["model"] if divisible else []))

    with jax.set_mesh(mesh):
        sharded = {name: put(x, "data") for name, x in inputs.items()}
        got = run(jax.tree.map(put_variable, variables), sharded)
        (outputs, _) = got[1]
    for output in jax.tree.leaves(outputs):
        assert output.sharding.spec[0] == "data"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, wanted)


def results_in_shard_map(module, variables, inputs, training, check_vma):
    """What `results` returns for the whole batch, from two devices with half of the rows each."""
    everywhere, by_rows = PartitionSpec(), PartitionSpec("data")
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])

    def shard(variables, inputs):
        (d_params, d_inputs), others = results(module, variables, inputs, training)
        if not check_vma:  # else JAX sums the gradients of replicated arrays
            d_params = jax.lax.psum(d_params, "data")
        return (d_params, d_inputs), others

    mapped = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(everywhere, by_rows),
        out_specs=((everywhere, by_rows), (by_rows, everywhere)),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(variables, jax.device_put(inputs, NamedSharding(mesh, by_rows)))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name, training", CASES)
def test_results_in_shard_map_match_one_device(name, training, check_vma):
    module, inputs, variables = draw(name)
    wanted = jax.jit(lambda v, x: results(module, v, x, training))(variables, inputs)
    if training is not None:
        module = module.clone(axis_name="data")
    got = results_in_shard_map(module, variables, inputs, training, check_vma)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, wanted)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="emulates a GPU")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("implementation", ["cpu", "gpu"])
def test_kernels_in_shard_map_match_one_device(implementation, check_vma):
    module, inputs, variables = draw("LSTM")
    wanted = jax.jit(lambda v, x: results(module, v, x, None))(variables, inputs)
    with emulation() if implementation == "gpu" else contextlib.nullcontext():
        module = module.clone(implementation=implementation)
        got = results_in_shard_map(module, variables, inputs, None, check_vma)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, wanted)


def test_population_statistics_on_explicit_mesh_match_one_device():
    module, inputs, variables = draw("BNLSTM")
    batches = [inputs["inputs"], 2 * inputs["inputs"]]
    training = {"use_running_average": False}
    wanted = bnlstm_jax.estimate_population_statistics(module, variables, batches, **training)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    batches = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in batches]
    with jax.set_mesh(mesh):
        got = bnlstm_jax.estimate_population_statistics(module, variables, batches, **training)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, wanted)
