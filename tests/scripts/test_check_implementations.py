import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlstm_jax import LSTM, recurrence
from bnlstm_jax.recurrence import Implementation, scan
from bnlstm_jax.recurrence.devices import emulation
from experiments.runtime.errors import UserError
from scripts import check_implementations
from scripts.check_implementations import ODD, Case


def check(run, monkeypatch, case=ODD):
    """The result of an implementation, in float32."""
    table = recurrence.IMPLEMENTATIONS | {"made up": Implementation(run)}
    monkeypatch.setattr(recurrence, "IMPLEMENTATIONS", table)
    monkeypatch.setattr(recurrence, "NAMES", ("auto", *table))
    (result,) = check_implementations.check_case(case, ["float32"], ["made up"], repeats=3)
    return result


def scaled_outputs(problem):
    result = scan.reference(problem)
    return result.replace(hidden=result.hidden * (1 + 1e-4))


def not_finite(problem):
    result = scan.reference(problem)
    return result.replace(hidden=result.hidden.at[1, 0, 0].set(jnp.nan))


def no_gradient_of_the_cell_bias(problem):
    params = dict(problem.params)
    params["cell_bias"] = jax.lax.stop_gradient(params["cell_bias"])
    return scan.reference(problem.replace(params=params))


def last_step_lost(problem):
    result = scan.reference(problem)
    return result.replace(hidden=result.hidden.at[-1].set(result.hidden[-2]))


FAULTS = {
    scaled_outputs: "outputs is off by",
    not_finite: "is off by inf",
    no_gradient_of_the_cell_bias: "gradients/params/cell_bias is off by",
    last_step_lost: "outputs is off by",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_fails(fault, monkeypatch):
    result = check(fault, monkeypatch)
    assert result["outcome"] == "failed" and FAULTS[fault] in result["problem"]


def test_a_second_plain_scan_passes(monkeypatch):
    result = check(scan.reference, monkeypatch)
    assert result["outcome"] == "passed"
    assert result["share"] <= 1 / check_implementations.FACTOR  # the same errors exactly


def test_calls_that_differ_fail(monkeypatch):
    """Though each of them is right but for rounding."""
    calls = iter(range(100))

    def rounding():
        return np.float32(1 + 2.0**-22 * (next(calls) % 2))

    def racing(problem):
        result = scan.reference(problem)
        factor = jax.pure_callback(rounding, jax.ShapeDtypeStruct((), jnp.float32))
        return result.replace(hidden=result.hidden * jax.lax.stop_gradient(factor))

    result = check(racing, monkeypatch)
    assert result["outcome"] == "failed"
    assert result["problem"].endswith("differs between calls with the same inputs")


def test_an_implementation_that_raises_fails_alone(monkeypatch):
    def raising(problem):
        raise RuntimeError("illegal memory access\nand a long trace")

    assert check(raising, monkeypatch) == {
        "dtype": "float32",
        "implementation": "made up",
        "outcome": "failed",
        "problem": "RuntimeError: illegal memory access",
    }


def calling(function):
    """The plain scan, which calls a function that returns zero when it runs."""

    def run(problem):
        result = scan.reference(problem)
        zero = jax.pure_callback(function, jax.ShapeDtypeStruct((), jnp.float32))
        return result.replace(hidden=result.hidden + jax.lax.stop_gradient(zero))

    return Implementation(run)


def test_nothing_is_checked_after_one_that_fails_when_it_runs(monkeypatch, tmp_path):
    """An illegal address leaves a GPU unusable; what was found before is kept."""

    def fault():
        raise RuntimeError("illegal address")

    monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "cpu", calling(fault))
    with pytest.raises(SystemExit):
        call_main(monkeypatch, tmp_path, cases=["LSTM", "masks"])
    found = json.loads((tmp_path / "check.json").read_text())
    assert [(r["case"], r["implementation"], r["outcome"]) for r in found["results"]] == [
        ("LSTM", "xla", "passed"),
        ("LSTM", "cpu", "failed"),
    ]
    assert found["running"] is None


def test_the_file_says_what_is_running(monkeypatch, tmp_path):
    """As when a kernel hangs, and the process is killed."""
    seen = []

    def look():
        seen.append(json.loads((tmp_path / "check.json").read_text())["running"])
        return np.float32(0)

    monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "cpu", calling(look))
    with pytest.raises(SystemExit):
        call_main(monkeypatch, tmp_path, cases=["LSTM"])
    sizes = {"case": "LSTM", "units": 7, "batch": 3, "steps": 5}
    assert seen[0] == {**sizes, "dtype": "float32", "implementation": "cpu"}


def test_a_kernel_that_cannot_be_compiled_is_tried_once(monkeypatch, tmp_path):
    tried = []

    def no_compiler(problem):
        tried.append(problem)
        raise RuntimeError("there is no compiler")

    broken = Implementation(scan.reference, no_compiler)
    monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "cpu", broken)
    with pytest.raises(SystemExit):
        call_main(monkeypatch, tmp_path, cases=["LSTM", "masks"])
    results = json.loads((tmp_path / "check.json").read_text())["results"]
    assert len(tried) == 1 and len(results) == 3
    assert results[0]["case"] == "compilation" and "no compiler" in results[0]["problem"]


@pytest.mark.parametrize("error, passes", [(1e-4, True), (0.1, False), (np.nan, False)])
def test_the_scan_has_to_be_right_itself(error, passes):
    """Or nothing could fail beside it."""
    expected = {"outputs": np.array([1.0, -2.0])}
    of_scan = check_implementations.largest_errors({"outputs": np.array([1 + error, -2])}, expected)
    problem = check_implementations.scan_problem(of_scan, expected, "float32")
    assert (problem is None) == passes


def test_what_an_implementation_refuses_is_told():
    dtypes, names = ["float32", "bfloat16"], ["xla", "cpu"]
    found = list(check_implementations.check_case(ODD, dtypes, names, repeats=2))
    outcomes = {(r["implementation"], r["dtype"]): r["outcome"] for r in found}
    assert outcomes == {
        ("xla", "float32"): "passed",
        ("cpu", "float32"): "passed",
        ("xla", "bfloat16"): "passed",
        ("cpu", "bfloat16"): "not supported",
    }
    assert "computes in float32" in found[-1]["problem"]


EMULATED = [
    name if name == "masks" else pytest.param(name, marks=pytest.mark.long)
    for name in check_implementations.CASES
]


@pytest.mark.parametrize("name", EMULATED)
def test_the_emulated_cuda_kernel_passes(name):
    """In small: what will be run on a GPU."""
    case = check_implementations.CASES[name]
    case = case._replace(
        units=min(case.units, 18), batch=min(case.batch, 40), steps=min(case.steps, 4)
    )
    with emulation():
        found = list(check_implementations.check_case(case, ["float32", "bfloat16"], ["gpu"], 2))
    assert [r["outcome"] for r in found] == ["passed"] * 2, found


def test_arrays_that_should_be_zero_are_held_against_others_of_their_kind():
    expected = {"gradients/a": np.array([1e-17]), "gradients/b": np.array([2.0, -50.0])}
    of_scan = {"gradients/a": 0.0, "gradients/b": 1e-6}
    allowed = check_implementations.allowed_errors(of_scan, expected)
    assert allowed == pytest.approx({"gradients/a": 2e-6 * 0.05, "gradients/b": 1e-5 + 2e-6 * 50})


@pytest.mark.parametrize("name", check_implementations.CASES)
def test_inputs_of_cases(name):
    """They can be made, have a row that ends early where padded, and the layer takes them."""
    case: Case = check_implementations.CASES[name]._replace(units=4, batch=5, steps=6)
    arrays = check_implementations.make_arrays(case)
    if case.padded:
        assert arrays["lengths"].max() == case.steps and arrays["lengths"].min() == 0
    layer = check_implementations.make_layer(case, "reference", None)
    shapes = jax.eval_shape(functools.partial(check_implementations.call, layer), arrays)
    assert shapes["outputs"].shape == (5, 6, 4)
    assert ("batch_stats" in shapes) == (case.layer is not LSTM)
    assert ("inputs" in shapes["gradients"]) == (not case.symbols)


def call_main(monkeypatch, tmp_path, **given):
    monkeypatch.chdir(tmp_path)
    default = {
        "cases": None, "implementations": None, "dtypes": ["float32"], "repeats": 1,
        "small": True, "output": "check.json",
    }  # fmt: skip
    fields = SimpleNamespace(**default | given)
    monkeypatch.setattr(check_implementations.flags, "FLAGS", fields)
    check_implementations.main([])


def test_the_exit_status_tells_of_failures(monkeypatch, tmp_path, capsys):
    broken = Implementation(scaled_outputs)
    monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "xla", broken)
    with pytest.raises(SystemExit) as ended:
        call_main(monkeypatch, tmp_path, cases=["LSTM"])
    assert ended.value.code == 1
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["cases"] == ["LSTM"] and found["machine"]["platform"] == "cpu"
    assert [(r["implementation"], r["outcome"]) for r in found["results"]] == [
        ("xla", "failed"),
        ("cpu", "passed"),
    ]
    assert "1 of 2 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, message",
    [
        ({"cases": ["mask"]}, "--cases is 'mask', which is unknown: did you mean masks?"),
        ({"implementations": ["gpu"]}, "--implementations is 'gpu', .* there are cpu, xla"),
        ({"dtypes": ["float16"]}, "--dtypes is 'float16'"),
        ({"output": "."}, "--output=. cannot be written"),
    ],
)
def test_mistakes_are_found_before_anything_runs(monkeypatch, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        call_main(monkeypatch, tmp_path, **given)
    assert not list(tmp_path.iterdir())
