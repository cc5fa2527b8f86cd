import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

from bnlstm_jax import BNLSTM
from experiments.benchmarking import timing
from experiments.runtime.errors import UserError
from scripts import benchmark

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.benchmark", "--small", "--device=cpu"]
# One thread of OpenMP's: with more, those of PyTorch wait for each other where others compute.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
OURS = {"BN-LSTM, xla", "BN-LSTM, reference", "LSTM, xla", "LSTM, reference"}
PROGRAMS = OURS | {"Flax OptimizedLSTMCell", "matrix products alone"}
NATIVE = {"BN-LSTM, cpu", "LSTM, cpu"}  # in float32
PEERS = {"PyTorch BN-LSTM, eager, float32", "torch.nn.LSTM, float32"}
BATCH, TIME, FEATURES, SYMBOLS = 6, 5, 4, 7

# Single precision. The first recurrent term is the same in all rows, so that PyTorch's batch mean
# of it is off by a rounding, 6e-8, of which dividing by sqrt(epsilon) makes 2e-5; a few steps of
# normalisation by standard deviations that are not small follow.
SINGLE = dict(rtol=0, atol=1e-4)


def run(*arguments):
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )


def has_torch():
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    "sizes, dtype, passes",
    [("pmnist,reader", "float32", "update"), ("ptb", "bfloat16", "forward")],
)
def test_every_candidate_is_measured(tmp_path, sizes, dtype, passes):
    output = tmp_path / "measured.json"
    done = run(
        f"--sizes={sizes}", f"--dtypes={dtype}", f"--passes={passes}", "--rounds=2",
        f"--output={output}",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(output.read_text())
    sizes, passes = sizes.split(","), passes.split(",")
    measured = [(r["size"], r["dtype"], r["pass"]) for r in found["results"]]
    assert measured == [(size, dtype, name) for size in sizes for name in passes]
    tables = done.stdout.split("| candidate ")[1:]
    assert len(tables) == len(measured)
    for result, table in zip(found["results"], tables, strict=True):
        candidates = result["candidates"]
        native = NATIVE if dtype == "float32" else set()
        assert set(candidates) == PROGRAMS | native | (PEERS if has_torch() else set())
        for name, values in candidates.items():
            assert f"| {name} " in table
            assert len(values["seconds"]) == 2 and min(values["seconds"]) > 0
            assert values["median"] == pytest.approx(sum(values["seconds"]) / 2)
            if name in PROGRAMS | native:
                assert values["memory_bytes"] > 0 and values["compile_seconds"] > 0
            else:
                assert values["memory_bytes"] is values["compile_seconds"] is None
    assert ("PyTorch is not installed" in done.stdout) == (not has_torch())
    assert found["peak_flops"] > 1e9 and "Peak in float32, " in done.stdout
    assert found["machine"]["platform"] == "cpu" and found["versions"]["jax"] == jax.__version__
    assert (found["versions"]["torch"] is None) == (not has_torch())
    assert found["sizes"].keys() == set(sizes) and found["flags"]["rounds"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["measured.json"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"sizes": ["ptb", "text9"]}, "--sizes is 'text9', which is unknown: did you mean text8?"),
        ({"dtypes": ["float64"]}, "--dtypes is 'float64', .* there are bfloat16, float32"),
        ({"passes": ["backward"]}, "--passes is 'backward', which is unknown"),
        ({"passes": []}, "--passes is empty: there are update, forward"),
        ({"output": "none/out.json"}, "--output=none/out.json cannot be written: No such file"),
        ({"output": "."}, "--output=. cannot be written: it is a folder"),
    ],
)
def test_mistakes_are_found_before_anything_runs(monkeypatch, tmp_path, given, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "find_device", None)
    default = {"sizes": ["ptb"], "dtypes": ["float32"], "passes": ["update"], "output": "out.json"}
    monkeypatch.setattr(benchmark.flags, "FLAGS", SimpleNamespace(**default | given))
    with pytest.raises(UserError, match=message):
        benchmark.main([])
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device=tpu: JAX has no such device here, only "):
        benchmark.find_device("tpu")


def test_a_mistake_is_one_line(tmp_path):
    done = run("--sizes=reeder", f"--output={tmp_path / 'out.json'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --sizes is 'reeder'") and done.stderr.count("\n") == 1


def test_operations_are_those_of_products():
    """Two for each number of the recurrent kernel, in each row; of embedded inputs' too."""
    recurrent = 2 * 784 * 100 * 100 * 400
    assert benchmark.operations(benchmark.SIZES["pmnist"], is_update=False) == recurrent
    assert benchmark.operations(benchmark.SIZES["pmnist"], is_update=True) == 3 * recurrent
    both_directions = 2 * 2 * 300 * 64 * (240 + 240) * 960
    assert benchmark.operations(benchmark.SIZES["reader"], is_update=False) == both_directions


def test_programs_take_turns():
    ran = []
    programs = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = timing.measure(programs, "", 3)
    assert "".join(ran) == "ab" * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert timing.spread([0.004, 0.001, 0.0025]) == ("2.5", "1.0 to 4.0")
    assert timing.spread([0.003], 1e-6) == ("3000.0", "3000.0 to 3000.0")


# ---- PyTorch's BN-LSTM is ours.


@pytest.fixture
def peers():
    pytest.importorskip("torch", reason="PyTorch is not installed: only benchmarks compare with it")
    from experiments.benchmarking import torch_peers

    return torch_peers


def draw_variables(layer, x, rng):
    """Variables of a layer, each moved from where it starts."""
    variables = layer.init(jax.random.key(0), x)
    return jax.tree.map(lambda v: v + 0.5 * rng.normal(size=v.shape).astype(np.float32), variables)


def copied(peers, variables, inputs, **options):
    """PyTorch's layer with the variables of ours."""
    import torch

    layer = peers.BNLSTM(FEATURES, inputs, TIME, **options)
    values = variables["params"] | variables["batch_stats"]
    layer.load_state_dict({name: torch.tensor(np.asarray(v)) for name, v in values.items()})
    return layer


@pytest.mark.parametrize("inputs, symbols", [(1, False), (3, False), (SYMBOLS, True)])
def test_the_eager_bn_lstm_is_ours(peers, inputs, symbols):
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
    assert np.std(y) > 0.1  # so that it is a test
    for term in ("input", "recurrent", "cell"):  # PyTorch's running variances are unbiased ones
        name = f"{term}_mean"
        np.testing.assert_allclose(getattr(eager, name), updated["batch_stats"][name], **SINGLE)


def test_the_masked_eager_bn_lstm_is_ours_in_both_directions(peers):
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
