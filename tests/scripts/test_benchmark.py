import importlib.util
import json

import jax
import pytest

from experiments.benchmarking import timing
from experiments.runtime.errors import UserError
from scripts import benchmark

HAS_TORCH = importlib.util.find_spec("torch") is not None
OURS = {"BN-LSTM, xla", "LSTM, xla", "Flax OptimizedLSTMCell", "matrix products alone"}
NATIVE = {"BN-LSTM, cpu", "LSTM, cpu"}  # float32 only
PEERS = {"PyTorch BN-LSTM, eager, float32", "torch.nn.LSTM, float32"} if HAS_TORCH else set()


@pytest.fixture
def measured(monkeypatch, tmp_path, call_main):
    """Calls the command with tiny layers on the CPU; returns its output and its file."""
    monkeypatch.setattr(timing, "use_device", lambda kind: jax.devices(kind)[0])
    cache = jax.config.jax_enable_compilation_cache
    default = {
        "passes": ["update"],
        "implementations": ["xla", "cpu"],
        "device": "cpu",
        "rounds": 2,
        "output": str(tmp_path / "measured.json"),
        "small": True,
    }

    def call(**given):
        output, _ = call_main(benchmark, **default | given)
        return output, json.loads((tmp_path / "measured.json").read_text())

    yield call
    jax.config.update("jax_enable_compilation_cache", cache)


def test_every_candidate_is_measured(measured):
    output, found = measured(sizes=["pmnist", "reader"], dtypes=["float32"])
    assert [(r["size"], r["dtype"], r["pass"]) for r in found["results"]] == [
        ("pmnist", "float32", "update"),
        ("reader", "float32", "update"),
    ]
    for result, table in zip(found["results"], output.split("| candidate ")[1:], strict=True):
        assert set(result["candidates"]) == OURS | NATIVE | PEERS
        for name, values in result["candidates"].items():
            assert f"| {name} " in table
            assert len(values["seconds"]) == 2 and min(values["seconds"]) > 0
            assert values["median"] == pytest.approx(sum(values["seconds"]) / 2)
            if name in PEERS:
                assert values["memory_bytes"] is values["compile_seconds"] is None
            else:
                assert values["memory_bytes"] > 0 and values["compile_seconds"] > 0
    assert ("PyTorch is not installed" in output) == (not HAS_TORCH)
    assert found["peak_flops"] > 1e9 and "Peak in float32, " in output
    assert found["machine"]["platform"] == "cpu" and found["versions"]["jax"] == jax.__version__
    assert found["sizes"].keys() == {"pmnist", "reader"} and found["flags"]["rounds"] == 2


def test_native_kernel_is_skipped_in_bfloat16(measured):
    _, found = measured(sizes=["ptb"], dtypes=["bfloat16"], passes=["forward"])
    (result,) = found["results"]
    assert set(result["candidates"]) == OURS | PEERS


@pytest.mark.parametrize(
    "given, message",
    [
        ({"sizes": ["ptb", "text9"]}, "--sizes is 'text9', .* text8"),
        ({"dtypes": ["float64"]}, "--dtypes is 'float64', .* float32"),
        ({"passes": ["backward"]}, "--passes is 'backward'"),
        ({"passes": []}, "--passes is empty"),
        ({"output": "none/out.json"}, "--output=none/out.json"),
        ({"output": "."}, "--output=. .* folder"),
    ],
)
def test_invalid_flags_raise_before_measurement(monkeypatch, tmp_path, call_main, given, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "use_device", None)
    default = {"sizes": ["ptb"], "dtypes": ["float32"], "passes": ["update"], "output": "out.json"}
    with pytest.raises(UserError, match=message):
        call_main(benchmark, **default | given)
    assert not list(tmp_path.iterdir())
