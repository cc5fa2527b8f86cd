"""The TPU kernel, interpreted: its scan against JAX's, and layers against `xla`.

Gradients of all kinds of layers are compared in test_implementations.py.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax.layers import abstract_problem
from bnlstm_jax.recurrence import pallas_tpu
from bnlstm_jax.recurrence.devices import emulation
from bnlstm_jax.recurrence.pallas_tpu import kernel_scan
from experiments.jax_experimental import topologies


@pytest.fixture(autouse=True)
def kernels_anywhere():
    with emulation():
        yield


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_kernel_scan_matches_lax_scan(steps, reverse):
    """With constants, carries and inputs of every rank, booleans, and trees of them."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    constants = {"matrix": draw(3, 3), "vector": draw(3)}
    carry = draw(2, 3), {"sum": draw(3)}
    flags = jnp.asarray(random.integers(0, 2, (steps, 2, 1)), bool)
    xs = draw(steps, 2, 3), (flags, draw(steps, 3), draw(steps)), None

    def body(constants, carry, x):
        h, total = carry
        rows, (flag, vector, scalar), _ = x
        h = jnp.where(~flag, h @ constants["matrix"] + rows, h) + vector * scalar
        return (h, {"sum": total["sum"] + constants["vector"] * h[0]}), (h, h.sum(), flag, h[1])

    found = jax.jit(lambda *given: kernel_scan(body, *given, reverse=reverse))(constants, carry, xs)
    expected = jax.lax.scan(lambda c, x: body(constants, c, x), carry, xs, reverse=reverse)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def train(layer, variables, x, weights, lengths):
    """Outputs, statistics and gradients."""

    def value(params, x):
        y, updated = layer.apply(
            {**variables, "params": params},
            x,
            seq_lengths=lengths,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        return jnp.vdot(weights, y), (y, updated)

    argnums = 0 if layer.vocab_size else (0, 1)
    return jax.jit(jax.grad(value, argnums, has_aux=True))(variables["params"], x)


def compare_training(batch, steps, features, lengths=None):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(batch, steps, 1)), jnp.float32)
    weights = jnp.asarray(random.normal(size=(batch, steps, features)), jnp.float32)
    layer = bnlstm_jax.BNLSTM(features, max_steps=steps, implementation="tpu")
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    given = variables, x, weights, lengths
    found, expected = (train(layer.clone(implementation=name), *given) for name in ("tpu", "xla"))

    def close(ours, theirs):
        # Both sum in float32 in their own order, over batch and time.
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4 * np.abs(theirs).max())

    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("batch, steps, features", [(7, 3, 100), (100, 3, 100), (2, 2, 100)])
def test_training_matches_xla_at_unaligned_sizes(batch, steps, features):
    compare_training(batch, steps, features)


@pytest.mark.long
def test_training_matches_xla_over_784_steps():
    compare_training(7, 784, 20, jnp.asarray([784, 1, 500, 783, 20, 0, 300]))


LOWERED = {
    "BN-LSTM": (bnlstm_jax.BNLSTM, {}),
    "BN-LSTM, masks": (bnlstm_jax.BNLSTM, {"lengths": True}),
    "BN-LSTM, bfloat16": (bnlstm_jax.BNLSTM, {"dtype": jnp.bfloat16}),
    "LSTM": (bnlstm_jax.LSTM, {}),
    "LN-LSTM": (bnlstm_jax.LNLSTM, {}),
    "symbols": (bnlstm_jax.BNLSTM, {"vocab_size": 50, "dtype": jnp.bfloat16}),
}


def training_and_inference(kind, options, units=100, batch=7, steps=3, inputs=1):
    """A function that runs both passes of a layer, and its arguments."""
    options = dict(options)
    lengths = jnp.full(batch, steps) if options.pop("lengths", False) else None
    layer = kind(units, implementation="tpu", **options)
    x, weights = jnp.ones((batch, steps, inputs)), jnp.ones((batch, steps, units))
    if layer.vocab_size:
        x = jnp.ones((batch, steps), int)
    variables = layer.clone(implementation="xla").init(
        jax.random.key(0), x, use_running_average=True
    )

    def both(variables, x):
        gradients = train(layer, variables, x, weights, lengths)
        return gradients, layer.apply(variables, x, seq_lengths=lengths, use_running_average=True)

    return both, (variables, x)


@pytest.mark.parametrize("kind, options", LOWERED.values(), ids=LOWERED.keys())
def test_kernel_lowers_for_tpu(kind, options):
    """Lowering refuses what a TPU cannot do, such as indexing by arrays, and needs no TPU."""
    both, arguments = training_and_inference(kind, options)
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(both).trace(*arguments).lower(lowering_platforms=("tpu",))
    # Forward, backward, and inference.
    assert lowered.as_text().count("tpu_custom_call") >= 3


def products(value, in_kernel=False):
    """Dtype and precision of the products in Pallas kernels within a jaxpr."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from products(each, in_kernel)
    for equation in getattr(getattr(value, "jaxpr", value), "eqns", ()):
        name, params = equation.primitive.name, equation.params
        if in_kernel and name == "dot_general":
            (precision,) = set(params["precision"])
            yield equation.invars[0].aval.dtype, precision
        yield from products([*params.values()], in_kernel or name == "pallas_call")


@pytest.mark.parametrize("precision", [None, "bfloat16", "high", "highest"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernel_products_use_precisions_supported_by_tpus(dtype, precision):
    """Mosaic supports the default for all operands, and `highest` only for 32-bit operands."""
    both, arguments = training_and_inference(bnlstm_jax.LSTM, {"dtype": dtype}, inputs=3)
    with jax.default_matmul_precision(precision):
        found = list(products(jax.make_jaxpr(both)(*arguments)))
    highest = dtype == jnp.float32 and precision in ("high", "highest")
    expected = jax.lax.Precision.HIGHEST if highest else jax.lax.Precision.DEFAULT
    assert (dtype, expected) in found and {each for _, each in found} == {expected}


COMPILED = {  # at the paper's sizes
    "pMNIST": ({"max_steps": 784}, {"batch": 100, "steps": 784}),
    "PTB": (
        {"max_steps": 99, "vocab_size": 50, "dtype": jnp.bfloat16},
        {"units": 1000, "batch": 64, "steps": 99},
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("options, sizes", COMPILED.values(), ids=COMPILED.keys())
def test_kernel_compiles_ahead_of_time_for_tpus(options, sizes, chip, monkeypatch):
    """The kernels fit the vector memory of these TPUs."""
    pytest.importorskip("libtpu", reason="needs the version of libtpu that jax[tpu] names")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # else libtpu looks for its cloud for minutes
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    both, arguments = training_and_inference(bnlstm_jax.BNLSTM, options, **sizes)
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("device",))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(both).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0


def test_tpus_refuse_other_dtypes(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "default_device", lambda: SimpleNamespace(platform="tpu"))
    assert pallas_tpu.why_unsupported(abstract_problem(bnlstm_jax.BNLSTM(2))) is None
    for fields in ({"dtype": jnp.float16}, {"param_dtype": jnp.float16}):
        problem = abstract_problem(bnlstm_jax.BNLSTM(2, **fields))
        assert "supports only a float32 state" in pallas_tpu.why_unsupported(problem)
