"""The CPU kernel: against the plain scan, its threads, and what it does not support.

test_implementations.py compares all outputs and gradients of a layer in all modes. These tests are
for sizes that are not multiples of a vector, and for what only this kernel has.
"""

import subprocess
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bnlstm_jax import BNLSTM, LNLSTM, LSTM, recurrence
from bnlstm_jax.cells import TERMS
from bnlstm_jax.layers import abstract_problem
from bnlstm_jax.recurrence.native import build, cpu
from tests.bnlstm_jax.test_implementations import run
from tests.python_process import finish, start

SUBSETS = [tuple(t for k, t in enumerate(TERMS) if bits >> k & 1) for bits in range(8)]


@pytest.fixture(autouse=True)
def on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("the kernel is for CPUs")


def compare(rtol=1e-4, **options):
    """Compares all outputs and gradients of a layer with those of the plain scan in float64.

    Float32 rounds by 6e-8. A normalisation with little variance multiplies this by up to 10, and
    steps follow each other.
    """
    zeros = nn.initializers.zeros  # `run` adds the same values to parameters of any dtype
    options |= {"input_kernel_init": zeros, "recurrent_kernel_init": zeros}
    if not options.get("plain"):
        options.setdefault("epsilon", 0.01)
    found = run("cpu", **options)
    with jax.enable_x64(True):
        expected = run("reference", param_dtype=jnp.float64, **options)

    def close(ours, theirs):
        scale = max(1e-3, np.abs(theirs).max(initial=0))
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * scale)

    jax.tree.map(close, found, expected)


SIZES = [  # units, batch, steps
    (1, 2, 2),
    (1, 100, 2),
    (7, 7, 2),
    (7, 2, 784),
    (100, 100, 3),
    (100, 129, 1),
    (241, 7, 2),
    (241, 129, 2),
]


@pytest.mark.parametrize("units, batch, steps", SIZES)
def test_kernel_matches_reference_at_unaligned_sizes(units, batch, steps):
    compare(features=units, batch=batch, time=steps)


@pytest.mark.parametrize("units, steps", [(1, 1), (7, 2), (100, 3)])
def test_lstm_matches_reference_for_batch_of_one(units, steps):
    compare(plain=True, features=units, batch=1, time=steps)


@pytest.mark.parametrize("normalize", SUBSETS, ids=lambda terms: "-".join(terms) or "none")
def test_kernel_matches_reference_for_each_subset_of_terms(normalize):
    compare(normalize=normalize, features=19, batch=9, lengths=(6, 0, 4, 1, 6, 2, 3, 5, 6))


@pytest.mark.parametrize("inputs", [1, 7, 8, 33])
@pytest.mark.parametrize("plain", [False, True])
def test_kernel_matches_reference_for_narrow_and_wide_inputs(inputs, plain):
    compare(plain=plain, inputs=inputs, features=19, batch=9)


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_kernel_matches_reference_for_random_shapes_and_options(data):
    def draw(name, *values):
        return data.draw(st.sampled_from(values), label=name)

    batch, steps = data.draw(st.integers(2, 20)), data.draw(st.integers(1, 4))
    lengths = data.draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    options = {"vocab_size": 5} if draw("symbols", False, True) else {"inputs": draw("D", 1, 3, 11)}
    if draw("plain", False, True):
        options["plain"] = True
    else:
        options |= {
            "normalize": draw("terms", *SUBSETS),
            "mask_statistics": draw("masked", True, False, ("recurrent",)),
            "input_statistics": draw("statistics", "per_step", "sequence"),
        }
    compare(
        features=data.draw(st.integers(1, 40)),
        batch=batch,
        time=steps,
        lengths=lengths,
        reverse=draw("reverse", False, True),
        carry=draw("carry", False, True),
        **options,
    )


def inference(layer, x, first_step=None, lengths=None):
    """A function from variables to a loss and the outputs, and variables of random values."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, use_running_average=True))
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(random.uniform(0.1, 0.9, leaf.shape), leaf.dtype), shapes
    )

    def value(variables):
        y = layer.apply(
            variables, x, first_step=first_step, seq_lengths=lengths, use_running_average=True
        )
        return jnp.sum(jnp.sin(3 * y)), y

    return value, variables


@pytest.mark.parametrize("make", [LSTM, BNLSTM])
@pytest.mark.parametrize("batch", [1, 2, 4, 5])
@pytest.mark.parametrize("inputs", [1, 20, "symbols"])
def test_inference_matches_reference_for_small_batches(make, batch, inputs):
    random, steps, units = np.random.default_rng(0), 9, 39
    if inputs == "symbols":
        x = jnp.asarray(random.integers(0, 6, (batch, steps)))
        fields = {"vocab_size": 6}
    else:
        x = jnp.asarray(random.normal(size=(batch, steps, inputs)), jnp.float32)
        fields = {}
    lengths = jnp.asarray([5, 0, 9, 3, 9][:batch])
    fields |= {"max_steps": 7} if make is BNLSTM else {}
    results = []
    for name in ("cpu", "reference"):
        value, variables = inference(make(units, implementation=name, **fields), x, None, lengths)
        results.append(value(variables)[1])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_kernel_matches_xla_for_over_a_million_sequences():
    x = np.random.default_rng(0).normal(size=(1_500_000, 1, 1)).astype(np.float32)
    layer = LSTM(1, implementation="cpu")
    variables = layer.init(jax.random.key(0), jnp.asarray(x[:2]))
    found, expected = (
        layer.clone(implementation=name).apply(variables, jnp.asarray(x)) for name in ("cpu", "xla")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_inference_gradients_match_reference():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 3)), jnp.float32)
    found = []
    for name in ("cpu", "reference"):
        value, variables = inference(BNLSTM(6, implementation=name, max_steps=3), x)
        found.append(jax.jit(jax.grad(lambda v, value=value: value(v)[0]))(variables))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


def test_out_of_range_symbols_give_nan_only_in_their_sequences():
    x = jnp.asarray([[0, 1, 2], [0, 3, 1], [0, -1, 2], [1, 1, 1], [2, 2, 2]])
    for rows in (5, 3):  # a batch, and few sequences, which the kernel runs by other code
        layer = LSTM(7, vocab_size=3, implementation="cpu")
        value, variables = inference(layer, x[:rows])
        unknown = np.isnan(value(variables)[1]).any((1, 2))
        assert unknown.tolist() == [False, True, True, False, False][:rows]


# ---- Numbers.


def test_tanh_error_is_within_the_documented_bound():
    """With f and o open and i shut, the cell state is kept and h = tanh(c)."""
    c = np.concatenate([np.linspace(-12, 12, 20001), 10.0 ** np.arange(-30, 3), [np.inf, np.nan]])
    c = jnp.asarray(c[:, None], jnp.float32)
    layer = LSTM(1, implementation="cpu", initial_hidden_init=nn.initializers.zeros)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 1, 1)))
    variables["params"]["bias"] = jnp.asarray([100.0, -100.0, 100.0, 0.0])  # f, i, o, g
    x = jnp.zeros((len(c), 1, 1))
    found = layer.apply(variables, x, initial_carry=(c, jnp.zeros_like(c)))[:, 0, 0]
    expected = np.tanh(np.float64(c[:, 0]))
    assert np.isnan(found[-1]) and found[-2] == 1
    np.testing.assert_allclose(found[:-1], expected[:-1], rtol=3.3e-7)


def test_statistics_are_about_as_accurate_as_xla():
    """Statistics of values with standard deviation 1 around 1,000, in float32."""
    random = np.random.default_rng(0)
    x = jnp.asarray(1000 + random.normal(size=(129, 2, 1)), jnp.float32)
    errors = {}
    for name in ("cpu", "xla", "exact"):
        with jax.enable_x64(name == "exact"):
            exact = {"param_dtype": jnp.float64} if name == "exact" else {"implementation": name}
            layer = BNLSTM(7, momentum=0.0, use_running_average=False, **exact)
            variables = layer.init(jax.random.key(0), x)
            updated = layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
            errors[name] = {k: np.float64(v) for k, v in updated.items() if k.startswith("input")}
    exact = errors.pop("exact")
    for name in exact:
        cpus, xlas = (np.abs(errors[k][name] / exact[name] - 1).max() for k in ("cpu", "xla"))
        assert cpus <= max(2 * xlas, 1e-6)


def test_training_is_bitwise_independent_of_thread_count(monkeypatch):
    found = []
    for threads in (1, 2, 3, 8):
        monkeypatch.setenv("BNLSTM_NUM_THREADS", str(threads))
        options = {"features": 101, "batch": 37, "lengths": [6, 3] * 18 + [0]}
        results = [run("cpu", inputs=inputs, **options) for inputs in (3, 9)]
        found.append(jax.tree.leaves(results))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_inference_is_bitwise_independent_of_thread_count(monkeypatch):
    """With enough units that products run in blocks, whose length depends on the thread's units."""
    layer = LSTM(600, implementation="cpu")
    x = np.random.default_rng(0).normal(size=(1, 5, 3)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    found = []
    for threads in (1, 3, 16):
        monkeypatch.setenv("BNLSTM_NUM_THREADS", str(threads))
        found.append(layer.apply(variables, x))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("value", ["two", "0", "-1", "", "4097"])
def test_invalid_thread_count_raises(value, monkeypatch):
    monkeypatch.setenv("BNLSTM_NUM_THREADS", value)
    message = f"BNLSTM_NUM_THREADS: expected 1 to 4096 threads, got '{value}'"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(run("cpu"))
    with pytest.raises(ValueError, match=message):
        cpu.threads()


@pytest.mark.parametrize("files, processors", [
    ({"cpu.max": "250000 100000\n"}, 3),
    ({"cpu.max": "50000 100000\n"}, 1),
    ({"cpu.max": "max 100000\n"}, 0),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0),
    ({}, 0),
])  # fmt: skip
def test_cgroup_quota_gives_the_processor_count(files, processors, tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert cpu.load().BnlstmProcessorsOfQuota(bytes(tmp_path)) == processors


def test_gradients_with_infinite_input_match_reference():
    x = jnp.ones((3, 4, 2)).at[1, 2, 0].set(jnp.inf)
    layer = LSTM(5, implementation="cpu")
    variables = layer.init(jax.random.key(0), x)

    def gradients(implementation):
        apply = layer.clone(implementation=implementation).apply
        return jax.grad(lambda p: jnp.sum(jnp.sin(apply({"params": p}, x))))(variables["params"])

    found, expected = gradients("cpu"), gradients("reference")
    assert np.isnan(found["input_kernel"][0]).all()
    for row in (found["input_kernel"][1], found["recurrent_kernel"], found["bias"]):
        assert np.isfinite(row).all()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


# ---- Symbols.


def symbols_and_loss(layer, shape):
    """Parameters of a layer, and a loss as a function of them, on random symbols below 6."""
    symbols = jnp.asarray(np.random.default_rng(0).integers(0, 6, shape))
    variables = layer.init(jax.random.key(0), symbols, use_running_average=True)

    def loss(params):
        y, _ = layer.apply(
            {**variables, "params": params},
            symbols,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        return jnp.sum(jnp.square(y))

    return variables["params"], loss


@pytest.mark.parametrize("kind", [LSTM, BNLSTM])
def test_symbol_gradients_agree_under_jit_and_checkpoint(kind):
    """Programs then return empty arrays, for which XLA's compiler divided by zero."""
    params, loss = symbols_and_loss(kind(5, vocab_size=6, implementation="cpu"), (3, 4))
    expected = jax.jit(jax.grad(loss))(params)
    for function in (loss, jax.jit(loss), jax.checkpoint(loss)):
        found = jax.grad(function)(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), found, expected)


@pytest.mark.parametrize("kind", [LSTM, BNLSTM])
def test_symbols_of_a_large_vocabulary_match_xla(kind):
    """Their rows are looked up before the kernel runs, because it would pack the whole table."""
    found = []
    for implementation in ("cpu", "xla"):
        layer = kind(5, vocab_size=1000, implementation=implementation)
        params, loss = symbols_and_loss(layer, (3, 4))
        found.append(jax.jit(jax.value_and_grad(loss))(params))

    def close(ours, theirs):  # as in `compare`
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())

    jax.tree.map(close, *found)


# ---- Transformations.


def small_layer():
    layer = LSTM(7, implementation="cpu")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 3)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    return layer, variables, x


def test_vmap_matches_separate_calls():
    layer, variables, x = small_layer()

    def loss(x):
        return layer.apply(variables, x).sum()

    batches = jnp.stack([x, 2 * x])
    found = jax.vmap(jax.grad(loss))(batches)
    np.testing.assert_array_equal(found, jnp.stack([jax.grad(loss)(each) for each in batches]))


def test_checkpoint_preserves_gradients():
    layer, variables, x = small_layer()

    def loss(params, x):
        return jnp.square(layer.apply({"params": params}, x)).sum()

    plain = jax.jit(jax.grad(loss))(variables["params"], x)
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(variables["params"], x)
    jax.tree.map(np.testing.assert_array_equal, plain, again)


def test_bidirectional_layers_match_reference():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50, 3)), jnp.float32)
    outputs = []
    for name in ("cpu", "reference"):
        model = nn.Bidirectional(*(LSTM(40, implementation=name) for _ in range(2)))
        variables = model.init(jax.random.key(0), x)
        outputs.append(jax.jit(model.apply)(variables, x))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_exporting_the_kernel_raises():
    layer, variables, x = small_layer()
    with pytest.raises(ValueError, match="bnlstm_cpu_forward"):
        jax.export.export(jax.jit(layer.apply))(variables, x)
    jax.export.export(jax.jit(layer.clone(implementation="xla").apply))(variables, x)


# ---- What runs a layer.

REFUSED = {
    "layer normalisation": (LNLSTM, {}, "layer normalisation"),
    "axis_name": (BNLSTM, {"axis_name": "batch"}, "axis_name"),
    "bfloat16": (LSTM, {"dtype": jnp.bfloat16}, "float32"),
    "float64": (LSTM, {"param_dtype": jnp.float64}, "float32"),
}


@pytest.mark.parametrize("make, fields, reason", REFUSED.values(), ids=REFUSED)
def test_unsupported_layers_raise_and_auto_selects_xla(make, fields, reason, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    problem = abstract_problem(make(8, **fields), batch=2)
    with pytest.raises(ValueError, match=rf"'cpu' .*{reason}.*implementation='xla'"):
        recurrence.choose("cpu", problem)
    assert recurrence.choose("auto", problem) == "xla"


def test_auto_selects_cpu_kernel_only_on_one_device(monkeypatch):
    problem = abstract_problem(BNLSTM(8), batch=2)
    assert jax.device_count() > 1 and recurrence.choose("auto", problem) == "xla"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert recurrence.choose("auto", problem) == "cpu"


# ---- Compiling.

CHOICE = """
    import logging
    logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
    from bnlstm_jax import LSTM, recurrence
    from bnlstm_jax.layers import abstract_problem
    print(recurrence.choose("auto", abstract_problem(LSTM(3), 2)))
"""


def test_auto_selects_xla_without_a_compiler(tmp_path):
    chosen, log = finish(start(CHOICE, PATH=tmp_path, XDG_CACHE_HOME=tmp_path))
    assert chosen == "xla"
    assert "WARNING implementation 'auto' uses 'xla': " in log and "install g++" in log


def test_auto_selects_xla_if_compilation_fails(tmp_path):
    chosen, log = finish(start(CHOICE, CXX="false", PATH="/bin:/usr/bin", XDG_CACHE_HOME=tmp_path))
    (kept,) = (tmp_path / "bnlstm_jax").glob("*.log")
    assert chosen == "xla"
    assert f"'auto' uses 'xla': recurrence.cc cannot be compiled, see {kept}" in log


def test_unwritable_cache_uses_a_temporary_folder(tmp_path):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    chosen, log = finish(
        start(CHOICE, PATH="/bin:/usr/bin", XDG_CACHE_HOME=cache, TMPDIR=temporary)
    )
    assert chosen == "cpu" and "WARNING compiled libraries are not cached: " in log
    assert not list(temporary.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_report_no_errors(sanitizer, tmp_path, monkeypatch):
    """They look for reads and writes out of bounds, and for data races of threads."""
    program = tmp_path / "run_cpu_kernel"
    source = Path(__file__).with_name("run_cpu_kernel.cc")
    options = ["-std=c++17", "-O1", "-g", "-w", "-pthread", f"-fsanitize={sanitizer}"]
    folders = ["-isystem", jax.ffi.include_dir(), "-I", cpu.SOURCE.parents[1]]
    command = [*build.cpp_compiler(), build.NATIVE, *options, *folders, "-o", program, source]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        pytest.skip(f"the compiler has no such sanitizer: {compiled.stderr[-200:]}")
    for threads in (1, 2, 5):
        monkeypatch.setenv("BNLSTM_NUM_THREADS", str(threads))
        ran = subprocess.run([program], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")
