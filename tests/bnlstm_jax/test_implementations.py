"""Each implementation of a layer against the plain scan, `reference`.

The TPU kernel is interpreted, and the CUDA kernel emulated without a GPU. See also
test_pallas_tpu.py, test_cuda_gpu.py and test_cpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax import recurrence
from bnlstm_jax.cells import Variant
from bnlstm_jax.layers import abstract_problem
from bnlstm_jax.recurrence import devices
from bnlstm_jax.recurrence.devices import emulation
from bnlstm_jax.recurrence.native import cuda
from bnlstm_jax.recurrence.problem import SMALL_INPUT

LENGTHS = (6, 1, 4, 0, 3)
CASES = {
    "plain": {},
    "one step": {"time": 1},
    "large input": {"inputs": SMALL_INPUT + 1},
    "symbols": {"vocab_size": 7},
    "many symbols": {"vocab_size": SMALL_INPUT + 1},
    "learned initial state": {"carry": False, "normalize": ("input", "cell")},
    "masks": {"lengths": LENGTHS},
    "masks, all rows counted": {"lengths": LENGTHS, "mask_statistics": False},
    "reversed": {"lengths": LENGTHS, "reverse": True, "keep_order": True},
    "statistics of sequences": {"input_statistics": "sequence", "lengths": LENGTHS},
    "statistics of sequences, symbols": {"input_statistics": "sequence", "vocab_size": 7},
    "recurrent term alone": {"normalize": ("recurrent",)},
    "unrolled": {"unroll": 4},
    "no cell bias, one bias twice": {"variant": Variant(bias_factor=2.0, cell_bias=False)},
    "another epsilon of the input term": {"variant": Variant(input_epsilon=0.5)},
    "LSTM": {"plain": True},
    "LSTM, learned initial state, integers": {"plain": True, "carry": False, "integers": True},
    "LSTM, large input, masks": {"plain": True, "inputs": SMALL_INPUT + 1, "lengths": LENGTHS},
    "LSTM, symbols": {"plain": True, "vocab_size": 7},
    "LSTM, batch of one": {"plain": True, "batch": 1},
}


@pytest.fixture(autouse=True)
def kernels_anywhere():
    with emulation():
        yield


def run(
    implementation,
    *,
    plain=False,
    features=4,
    batch=5,
    time=6,
    inputs=3,
    lengths=None,
    carry=True,
    integers=False,
    **options,
):
    """Carry, outputs and statistics of a layer, and all gradients of a randomly weighted loss."""
    kind = bnlstm_jax.LSTM if plain else bnlstm_jax.BNLSTM
    layer = kind(features, implementation=implementation, return_carry=True, **options)
    random = np.random.default_rng(0)
    if layer.vocab_size:
        x = jnp.asarray(random.integers(0, layer.vocab_size, (batch, time)))
    else:
        x = jnp.asarray(random.normal(size=(batch, time, inputs)), jnp.float32)
    if integers:
        x = jnp.round(x).astype(jnp.int32)
    lengths = None if lengths is None else jnp.asarray(lengths)
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    params = jax.tree.map(
        lambda p: jnp.asarray(p + 0.3 * random.normal(size=p.shape), p.dtype), variables["params"]
    )
    if carry:
        shape = batch, features
        carry = tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(2))
    else:
        carry = None
    weights = jnp.asarray(random.normal(size=(batch, time, features)), jnp.float32)

    def value(params, x, carry):
        (last, outputs), updated = layer.apply(
            {**variables, "params": params},
            x,
            initial_carry=carry,
            seq_lengths=lengths,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        total = jnp.vdot(weights, outputs.astype(jnp.float32)) + last[0].sum() - last[1].sum()
        return total, (last, outputs, updated)

    argnums = (0, 2) if layer.vocab_size or integers else (0, 1, 2)
    return jax.jit(jax.value_and_grad(value, argnums, has_aux=True))(params, x, carry)


@functools.cache
def by_plain_scan(case):
    return run("reference", param_dtype=jnp.float64, **CASES[case])


# Interpreted and emulated kernels are slow. For them, the short suite has only these cases, which
# differ within the kernel.
IN_KERNEL = (
    "one step",
    "symbols",
    "masks",
    "reversed",
    "statistics of sequences",
    "LSTM, batch of one",
)
IN_CUDA_KERNEL = (*IN_KERNEL, "masks, all rows counted", "recurrent term alone", "LSTM, symbols")
EVERY = [("xla", case) for case in CASES] + [
    pytest.param("tpu", case, marks=() if case in IN_KERNEL else pytest.mark.long) for case in CASES
]


@pytest.mark.parametrize("name, case", EVERY)
def test_outputs_statistics_and_gradients_agree(name, case):
    with jax.enable_x64(True):
        found = run(name, param_dtype=jnp.float64, **CASES[case])
        expected = by_plain_scan(case)
    # All but the inputs is float64. In each of six steps, a normalisation with little variance can
    # multiply rounding errors by up to 316.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), found, expected
    )


NATIVE = [("cpu", case) for case in CASES] + [
    pytest.param("gpu", case, marks=() if case in IN_CUDA_KERNEL else pytest.mark.long)
    for case in CASES
]


@pytest.mark.parametrize("name, case", NATIVE)
def test_native_kernels_match_the_reference(name, case):
    """In float32, because the kernels do not support float64."""
    if name == "cpu" and jax.default_backend() != "cpu":
        pytest.skip("the kernel is for CPUs")
    options = CASES[case]
    if not options.get("plain"):
        options = options | {"epsilon": 0.01}
    with jax.default_matmul_precision("highest"):
        found, expected = (run(each, **options) for each in (name, "reference"))

    # Float32 rounds by 6e-8. Each of six normalisations of nearly equal rows multiplies this by up
    # to 10; with the default epsilon, 1e-5, it would be 316.
    def close(ours, theirs):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-5 * max(1, np.abs(theirs).max())
        )

    jax.tree.map(close, found, expected)


MIXED = [(name, {}) for name in ("xla", "tpu", "gpu")] + [
    pytest.param(name, options, marks=() if name == "xla" else pytest.mark.long)
    for name in ("xla", "tpu", "gpu")
    for options in ({"plain": True}, {"vocab_size": 7}, {"inputs": 20})
]


@pytest.mark.parametrize("name, options", MIXED)
def test_implementations_agree_in_mixed_precision(name, options):
    options = {"dtype": jnp.bfloat16, "batch": 16, **options}
    found, expected = run(name, **options), run("reference", **options)
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, expected)

    def compare(ours, theirs, share):
        def close(a, b):
            a, b = np.float32(a), np.float32(b)
            np.testing.assert_allclose(a, b, rtol=share, atol=share * max(1e-3, np.abs(b).max()))

        jax.tree.map(close, ours, theirs)

    (_, (carry, outputs, statistics)), gradients = found
    (_, (their_carry, their_outputs, their_statistics)), their_gradients = expected
    # Forward, products have the same bfloat16 operands; sums, statistics and state are float32.
    compare((carry, statistics), (their_carry, their_statistics), 1e-5)
    compare(outputs, their_outputs, 2**-8)  # of bfloat16
    # Backward, operands are rounded to bfloat16 (2^-9) at different places. The plain scan rounds
    # in the gradients of kernels at each of six steps, the others once.
    compare(gradients, their_gradients, 0.02)


INFERENCE = {
    "full": {},
    "masks": {"lengths": (6, 1, 4, 0, 3)},
    "beyond max_steps": {"max_steps": 2},
    "a later piece": {"first_step": 3},
    "statistics of sequences": {"input_statistics": "sequence"},
    "shared statistics": {"shared_statistics": True, "max_steps": None},
    "batch of one": {"batch": 1},
    "symbols": {"vocab_size": 7},
    "another epsilon of the input term": {"variant": Variant(input_epsilon=0.5)},
}


@pytest.mark.parametrize("name", ["tpu", "gpu", "cpu"])
@pytest.mark.parametrize("case", INFERENCE.values(), ids=INFERENCE.keys())
def test_inference_matches_the_reference(case, name):
    options = dict(case)
    batch, lengths = options.pop("batch", 5), options.pop("lengths", None)
    first_step = options.pop("first_step", None)
    lengths = None if lengths is None else jnp.asarray(lengths)
    random = np.random.default_rng(1)
    if "vocab_size" in options:
        x = jnp.asarray(random.integers(0, 7, (batch, 6)))
    else:
        x = jnp.asarray(random.normal(size=(batch, 6, 3)), jnp.float32)
    layer = bnlstm_jax.BNLSTM(4, **({"max_steps": 8} | options), implementation="reference")
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    variables["batch_stats"] = {
        name: jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        for name, leaf in variables["batch_stats"].items()
    }

    def outputs(implementation):
        return layer.clone(implementation=implementation).apply(
            variables, x, seq_lengths=lengths, first_step=first_step, use_running_average=True
        )

    if name == "cpu" and jax.default_backend() != "cpu":
        pytest.skip("the kernel is for CPUs")
    with jax.default_matmul_precision("highest"):  # GPUs take less by default
        np.testing.assert_allclose(outputs(name), outputs("reference"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["xla", "tpu", "gpu", "cpu"])
def test_nan_stays_in_its_sequence_at_inference(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)
    layer = bnlstm_jax.BNLSTM(3, max_steps=3, implementation=name, use_running_average=True)
    variables = layer.init(jax.random.key(0), x)
    x = x.at[1, 0, 0].set(jnp.nan)

    def loss(x, carry):
        return layer.apply(variables, x, initial_carry=carry)[jnp.array([0, 2, 3])].sum()

    carry = (jnp.full((4, 3), 0.1), jnp.full((4, 3), 0.2))
    d_x, (d_c, d_h) = jax.grad(loss, (0, 1))(x, carry)
    for gradient in (d_x, d_c, d_h):
        rows = np.isfinite(gradient).reshape(4, -1)
        assert rows[[0, 2, 3]].all() and np.any(gradient[0] != 0)


@pytest.mark.parametrize("name", ["xla", "tpu", "gpu", "cpu"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_statistics_are_used_in_float32(name, dtype):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(4, 3, 2)), jnp.float32)
    layer = bnlstm_jax.BNLSTM(3, max_steps=3, implementation=name, use_running_average=True)
    variables = layer.init(jax.random.key(0), x)
    half = jax.tree.map(
        lambda leaf: jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), dtype),
        variables["batch_stats"],
    )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    got, expected = (layer.apply({**variables, "batch_stats": each}, x) for each in (half, wide))
    np.testing.assert_array_equal(got, expected)


def test_xla_uses_at_most_half_the_reference_memory():
    x = jnp.zeros((32, 50, 1))

    def memory(implementation):
        layer = bnlstm_jax.BNLSTM(32, implementation=implementation)
        variables = layer.init(jax.random.key(0), x, use_running_average=True)

        def loss(params):
            apply = {"use_running_average": False, "mutable": ["batch_stats"]}
            return layer.apply({**variables, "params": params}, x, **apply)[0].sum()

        program = jax.jit(jax.grad(loss)).lower(variables["params"]).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory("xla") <= memory("reference") / 2


def test_forward_mode_works_in_reference_but_raises_in_xla():
    x = jnp.ones((2, 3, 1))
    layer = bnlstm_jax.LSTM(2, implementation="reference")
    variables = layer.init(jax.random.key(0), x)
    tangent = jax.jvp(lambda x: layer.apply(variables, x), (x,), (x,))[1]
    gradients = jax.jacrev(lambda x: layer.apply(variables, x))(x)
    expected = jnp.tensordot(gradients, x, 3)
    np.testing.assert_allclose(tangent, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: layer.clone(implementation="xla").apply(variables, x), (x,), (x,))


def test_unknown_implementation_raises():
    with pytest.raises(ValueError, match=r"implementation: .*'auto', 'xla', .*'gpu'.* got 'cuda'"):
        run("cuda")


def chosen(layer, batch=1):
    return recurrence.choose(layer.implementation, abstract_problem(layer, batch))


@pytest.fixture
def gpu_kernel_is_for_this_device(monkeypatch):
    """Declares the GPU kernel to be for the device of the tests, and validated on it."""
    device = jax.devices()[0]
    kernels = {name: recurrence.IMPLEMENTATIONS[name] for name in ("xla", "gpu")}
    kernels["gpu"] = kernels["gpu"]._replace(platform=device.platform)
    monkeypatch.setattr(recurrence, "IMPLEMENTATIONS", kernels)
    monkeypatch.setattr(recurrence, "VALIDATED_UNITS", {device.device_kind: 8})
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    recurrence.log_choice.cache_clear()


CHOICES = {
    "validated": ("gpu", {}, 2, "validated on"),
    "more units than validated": ("xla", {"features": 9}, 2, "validated up to 8 units on"),
    "a large batch": ("xla", {}, 129, "supports up to 128 sequences, got 129"),
    "layer normalisation": ("xla", {"kind": bnlstm_jax.LNLSTM}, 2, "layer normalisation"),
    "an axis name": ("xla", {"axis_name": "batch"}, 2, "axis_name"),
    "dtypes": ("xla", {"dtype": jnp.float16}, 2, "dtype float16"),
}


@pytest.mark.parametrize("case", CHOICES.values(), ids=CHOICES.keys())
def test_auto_selects_and_logs_an_implementation_once(case, gpu_kernel_is_for_this_device, caplog):
    expected, options, batch, why = case
    options = {"features": 8, "kind": bnlstm_jax.BNLSTM} | options
    layer = options.pop("kind")(**options)
    assert layer.implementation == "auto"
    with caplog.at_level("INFO"):
        assert chosen(layer, batch) == expected
        assert chosen(layer, batch) == expected
    (record,) = caplog.records  # once
    assert f"'auto' uses '{expected}': " in record.getMessage() and why in record.getMessage()


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_auto_selects_xla_if_the_kernel_cannot_be_loaded(
    error, caplog, monkeypatch, gpu_kernel_is_for_this_device
):
    def fail(*_):
        raise error("no compiler")

    monkeypatch.setattr(cuda, "load", fail)
    assert chosen(bnlstm_jax.LSTM(8)) == "xla"
    assert [(r.levelname, "no compiler" in r.getMessage()) for r in caplog.records] == [
        ("WARNING", True)
    ]


def test_auto_selects_xla_without_a_validated_kernel(monkeypatch, gpu_kernel_is_for_this_device):
    monkeypatch.setattr(recurrence, "VALIDATED_UNITS", {})
    assert chosen(bnlstm_jax.LSTM(2)) == "xla"
    monkeypatch.delitem(recurrence.IMPLEMENTATIONS, "gpu")
    assert chosen(bnlstm_jax.LSTM(2)) == "xla"


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_kernels_raise_on_other_devices(name, monkeypatch):
    monkeypatch.setattr(devices, "_emulating", False)
    monkeypatch.setattr(devices, "default_device", lambda: jax.devices("cpu")[0])
    layer = bnlstm_jax.LSTM(2, implementation=name)
    with pytest.raises(ValueError, match=f"implementation='{name}' .*'cpu'.*'xla'"):
        layer.init(jax.random.key(0), jnp.ones((2, 3, 1)))
    assert name not in recurrence.available()
