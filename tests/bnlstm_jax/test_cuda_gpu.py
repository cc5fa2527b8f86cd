"""The CUDA kernel, emulated without a GPU: sizes, dtypes, statistics, and compilation.

Gradients of all kinds of layers are compared in test_implementations.py. On a machine with an
NVIDIA GPU the same tests run on it.
"""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax import recurrence
from bnlstm_jax.cells import Variant
from bnlstm_jax.layers import abstract_problem
from bnlstm_jax.normalization import Normalization, Statistics
from bnlstm_jax.recurrence.devices import emulation
from bnlstm_jax.recurrence.native import build, cuda
from bnlstm_jax.recurrence.problem import Problem
from bnlstm_jax.recurrence.scan import reference

EPSILON = 1e-5
BOTH = ("recurrent", "cell")


@pytest.fixture(autouse=True)
def full_precision():
    """For products outside of the kernel: GPUs use less precision by default."""
    with jax.default_matmul_precision("highest"), emulation():
        yield


def draw(seed, units, batch, steps, terms, given):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    sizes = {"recurrent": 4 * units, "cell": units}
    params = {f"{term}_scale": 0.1 + 0.1 * normal(sizes[term]) for term in terms}
    params |= {"cell_bias": normal(units), "bias": normal(4 * units)}
    params["input_kernel"] = normal(3, 4 * units)
    kernel = normal(units, 4 * units) / units**0.5
    carry = normal(batch, units), normal(batch, units)
    statistics = None
    if given:
        statistics = {
            term: Statistics(normal(steps, sizes[term]), jnp.square(normal(steps, sizes[term])))
            for term in terms
        }
    return (kernel, params, carry, normal(steps, batch, 3)), statistics


def results(run, arguments, weights):
    """Outputs, moments and gradients of a recurrence, with random weights on its outputs."""

    def value(*arguments):
        result = run(*arguments)
        (c, h), hidden = result.carry, result.hidden
        return jnp.vdot(weights, hidden) + c.sum() - h.sum(), result

    return jax.jit(jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True))(*arguments)


def compare(
    units,
    batch,
    steps,
    terms=BOTH,
    lengths=None,
    given=False,
    dtype=None,
    block=0,
    epsilon=EPSILON,
):
    arguments, statistics = draw(0, units, batch, steps, terms, given)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(steps, batch, units)), jnp.float32)
    valid = None
    if lengths is not None:
        valid = (jnp.arange(steps)[:, None] < jnp.asarray(lengths))[..., None]
    norm = Normalization(terms, epsilon=epsilon, masked=terms)

    def by_scan(*arguments):
        return reference(Problem(*arguments, None, valid, statistics, norm, dtype))

    def by_kernel(*arguments):
        problem = Problem(*arguments, None, valid, statistics, norm, dtype)
        return cuda.run(problem, units_of_block=block)

    found = results(by_kernel, arguments, weights)
    expected = results(by_scan, arguments, weights)
    # Float32 rounds by 6e-8, and a normalisation multiplies this by up to 316. In the backward
    # passes, operands are rounded to bfloat16 (2^-9) at different places.
    rtol, atol = (1e-4, 1e-5) if dtype is None else (0.02, 0.02)

    def close(ours, theirs):
        atol_here = atol * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol_here)

    jax.tree.map(close, found, expected)


# A block has 2, 4 or 8 units, and a batch is padded to 32, 64 or 128 sequences.
SIZES = [(4, 32, 3), (5, 7, 3), (9, 33, 2), (3, 100, 2), (6, 128, 2), (4, 1, 2), (6, 5, 1)]


@pytest.mark.parametrize("units, batch, steps", SIZES)
def test_kernel_matches_reference_at_several_sizes(units, batch, steps):
    compare(units, batch, steps)


@pytest.mark.parametrize("block", [4, 8])
def test_kernel_matches_reference_for_larger_blocks(block):
    # Few rows may be nearly equal: a large epsilon keeps their rounding errors small.
    compare(10, 5, 3, block=block, lengths=(3, 1, 2, 0, 3), epsilon=0.01)


@pytest.mark.parametrize("batch", [5, 40, 100])
def test_bfloat16_kernel_matches_reference(batch):
    compare(18, batch, 2, dtype=jnp.bfloat16)


@pytest.mark.parametrize("terms", [(), ("recurrent",), ("cell",)])
def test_kernel_matches_reference_for_subsets_of_terms(terms):
    compare(5, 6, 3, terms)


@pytest.mark.parametrize("lengths", [None, (4, 1, 3, 0, 2)])
def test_kernel_matches_reference_with_given_statistics(lengths):
    compare(5, 5, 4, given=True, lengths=lengths)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_kernel_matches_reference_for_140_units(dtype):
    compare(140, 4, 2, dtype=dtype)


@pytest.mark.long
@pytest.mark.parametrize("units, batch, steps", [(100, 100, 10), (6, 7, 784)])
def test_kernel_matches_reference_at_paper_width_or_length(units, batch, steps):
    compare(units, batch, steps)


@pytest.mark.parametrize("batch", [3, 100])
def test_identical_hidden_states_are_normalised_to_exactly_zero(batch):
    """The first recurrent term, if all examples have the same initial hidden state."""
    (kernel, params, (c, h), inputs), _ = draw(0, 5, batch, 1, BOTH, False)

    def hidden(h):
        carry = c, jnp.broadcast_to(h, c.shape)
        return cuda.run(Problem(kernel, params, carry, inputs, norm=Normalization(BOTH))).hidden

    np.testing.assert_array_equal(hidden(h[0]), hidden(jnp.zeros(5)))


def test_oversized_batches_fall_back_to_xla():
    layer = bnlstm_jax.LSTM(2, implementation="gpu")
    chosen = [
        recurrence.choose("gpu", abstract_problem(layer, cuda.LARGEST_BATCH + more))
        for more in (0, 1)
    ]
    assert chosen == ["gpu", "xla"]
    x = jnp.ones((cuda.LARGEST_BATCH + 1, 2, 1))
    assert layer.apply(layer.init(jax.random.key(0), x), x).shape == (len(x), 2, 2)


def test_float32_layer_matches_xla_with_float64_enabled():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)), jnp.float32)
    with jax.enable_x64(True):
        layer = bnlstm_jax.LSTM(4, variant=Variant(cell_bias=False))
        variables = layer.init(jax.random.key(0), x)
        outputs = [layer.clone(implementation=name).apply(variables, x) for name in ("gpu", "xla")]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="too much for the emulation")
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("units, batch, steps", [(240, 64, 50), (1000, 64, 20)])
def test_kernel_matches_reference_for_many_units(units, batch, steps, dtype):
    if cuda.why_unsupported(abstract_problem(bnlstm_jax.BNLSTM(units, dtype=dtype), batch)):
        pytest.skip("too large for this GPU")
    lengths = np.random.default_rng(0).integers(1, steps + 1, batch)
    compare(units, batch, steps, lengths=lengths, dtype=dtype, epsilon=0.01)


def test_residuals_hold_only_states_and_recurrent_terms():
    """The residuals of each step are h, c and the recurrent term `[batch, 4H]`."""
    layer = bnlstm_jax.BNLSTM(16, max_steps=10, use_running_average=False, implementation="gpu")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 10, 1)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)

    def outputs(params):
        return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    _, pull_back = jax.vjp(outputs, variables["params"])
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "nbytes"))
    row = 4 * 10 * 32 * 16  # bytes of a float32 state of every step
    assert 6 * row < kept < 7 * row  # the rest is inputs, statistics and parameters


def test_vmap_matches_separate_calls():
    layer = bnlstm_jax.BNLSTM(3, implementation="gpu")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5, 2)), jnp.float32)
    variables = layer.init(jax.random.key(0), x[0], use_running_average=True)

    def outputs(x):
        return layer.apply(variables, x, use_running_average=True)

    np.testing.assert_allclose(
        jax.vmap(outputs)(x), jnp.stack([*map(outputs, x)]), rtol=1e-6, atol=1e-8
    )


REFUSED = {
    "axis_name": (bnlstm_jax.BNLSTM, {"axis_name": "batch"}, "axis_name.*'xla'"),
    "layer normalisation": (bnlstm_jax.LNLSTM, {}, "layer normalisation.*'xla'"),
    "dtype": (bnlstm_jax.BNLSTM, {"dtype": jnp.float16}, "dtype float16"),
    "size": (bnlstm_jax.BNLSTM, {"features": 4000}, "does not fit .* 4000 units, 32 rows"),
}


@pytest.mark.parametrize("kind, options, message", REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_options_raise(kind, options, message):
    layer = kind(**{"features": 2} | options, implementation="gpu")
    x = jnp.ones((2, 3, 1))
    with pytest.raises(ValueError, match=message):  # when it is traced
        jax.eval_shape(lambda: layer.init(jax.random.key(0), x, use_running_average=False))


def test_older_gpus_are_unsupported(monkeypatch):
    turing = SimpleNamespace(platform="gpu", compute_capability="7.5")
    monkeypatch.setattr(cuda, "default_device", lambda: turing)
    problem = abstract_problem(bnlstm_jax.BNLSTM(2))
    assert "needs a GPU of compute capability 8.0 or newer" in cuda.why_unsupported(problem)


FITTING = {  # the paper's sizes, on an H200
    "pMNIST": (100, 100, None, True),
    "Penn Treebank": (1000, 64, jnp.bfloat16, True),
    "Penn Treebank, float32": (1000, 64, None, True),
    "text8": (2000, 128, jnp.bfloat16, False),  # the recurrent kernel alone has 32 MB
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="emulates one GPU's sizes")
@pytest.mark.parametrize("units, batch, dtype, fits", FITTING.values(), ids=FITTING.keys())
def test_why_unsupported_rejects_layers_too_large(units, batch, dtype, fits):
    """A block's arrays must fit its shared memory, and all blocks the device at once."""
    problem = abstract_problem(bnlstm_jax.BNLSTM(units, dtype=dtype), batch)
    assert (cuda.why_unsupported(problem) is None) == fits


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="emulates another GPU")
def test_smaller_gpu_supports_fewer_units():
    library = cuda.load("cpu")

    def fits(units):
        return cuda.why_unsupported(abstract_problem(bnlstm_jax.LSTM(units), 64)) is None

    assert fits(1000)
    library.BnlstmEmulate(82, 99 * 1024)  # a GeForce RTX 3090
    try:
        assert fits(328) and not fits(330)
    finally:
        library.BnlstmEmulate(132, 227 * 1024)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["80", "86", "89", "90", "100", "120"])
def test_kernel_compiles_for_other_gpus(architecture, tmp_path):
    """With nearly all values in registers, which the compiler reports."""
    try:
        command = build.nvcc_command(cuda.SOURCE, architecture)
    except RuntimeError as error:
        pytest.skip(str(error))
    if f"sm_{architecture}" not in build.run([command[0], "--list-gpu-code"]).stdout.split():
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    done = build.run([*command, "-Xptxas=-v", "-o", str(tmp_path / "kernel.so")])
    assert done.returncode == 0, done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    # Both passes and dtypes; 2, 4 and 8 units of a block; 32, 64 and 128 sequences.
    assert len(registers) == len(spilled) == 36
    # Blocks of 512 threads have 128 registers a thread, so they spill some values to memory.
    assert max(registers) <= 255 and max(spilled) <= 160
