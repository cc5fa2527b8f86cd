"""The checks find faults in implementations that are wrong on purpose."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlstm_jax import LSTM, recurrence
from bnlstm_jax.recurrence import Implementation, scan
from bnlstm_jax.recurrence.devices import emulation
from experiments.validation import check
from experiments.validation.check import CASES, ODD, SMALL_CASES


def second_scan(problem):
    return scan.reference(problem)


def scaled_outputs(problem):
    result = scan.reference(problem)
    return result.replace(hidden=result.hidden + 1e-4 * jax.lax.stop_gradient(result.hidden))


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


def calling(function):
    """The plain scan, with outputs multiplied by the result of a callback."""

    def run(problem):
        result = scan.reference(problem)
        factor = jax.pure_callback(function, jax.ShapeDtypeStruct((), jnp.float32))
        return result.replace(hidden=result.hidden * jax.lax.stop_gradient(factor))

    return run


def raising_when_traced(problem):
    raise RuntimeError("no such instruction\nand a long trace")


def fault():
    raise RuntimeError("illegal address")


numbers = iter(range(100))
FAULTS = {
    scaled_outputs: "outputs is off by",
    not_finite: "is off by inf",
    no_gradient_of_the_cell_bias: "gradients/params/cell_bias is off by",
    last_step_lost: "outputs is off by",
    raising_when_traced: "RuntimeError: no such instruction",
}
IMPLEMENTATIONS = {function.__name__: function for function in (second_scan, *FAULTS)} | {
    # Each call is correct up to rounding, but two calls differ.
    "racing": calling(lambda: np.float32(1 + 2.0**-22 * (next(numbers) % 2))),
    "fatal": calling(fault),
    "never reached": second_scan,
}


@pytest.fixture(scope="module")
def results():
    """The float32 results by implementation, without records of running checks."""
    with pytest.MonkeyPatch.context() as patch:
        table = {name: Implementation(run) for name, run in IMPLEMENTATIONS.items()}
        table |= recurrence.IMPLEMENTATIONS
        patch.setattr(recurrence, "IMPLEMENTATIONS", table)
        patch.setattr(recurrence, "NAMES", ("auto", *table))
        found = list(check.check_case(ODD, ["float32"], list(IMPLEMENTATIONS), repeats=3))
    return {r["implementation"]: r for r in found if r["outcome"] != "running"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_faulty_implementations_fail(fault, results):
    result = results[fault.__name__]
    assert result["outcome"] == "failed" and FAULTS[fault] in result["problem"]


def test_copy_of_the_reference_scan_passes(results):
    assert results["second_scan"]["outcome"] == "passed"
    assert results["second_scan"]["share"] <= 1 / check.FACTOR  # exactly the same errors


def test_nondeterministic_calls_fail(results):
    assert results["racing"]["outcome"] == "failed"
    assert results["racing"]["problem"].endswith("differs between calls with the same inputs")


def test_checks_stop_after_a_runtime_error(results):
    """An illegal address leaves a GPU unusable."""
    assert list(results)[-1] == "fatal" and results["fatal"]["outcome"] == "failed"


def test_fatal_failure_ends_all_cases(monkeypatch):
    found = [{"outcome": "passed"}, {"outcome": "failed", "is_fatal": True}]
    monkeypatch.setattr(check, "check_case", lambda *_: iter(found))
    assert [r["case"] for r in check.check_cases(CASES, ["float32"], [])] == ["odd sizes"] * 2


def test_kernel_with_compilation_error_is_tried_only_once(monkeypatch):
    def no_compiler(problem):
        raise RuntimeError("there is no compiler")

    broken = Implementation(scan.reference, no_compiler)
    monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "cpu", broken)
    monkeypatch.setattr(check, "check_case", lambda case, dtypes, names: iter([{"outcome": names}]))
    compilation, case = check.check_cases({"odd sizes": ODD}, ["float32"], ["xla", "cpu"])
    assert (compilation["case"], compilation["outcome"]) == ("compilation", "failed")
    assert "no compiler" in compilation["problem"] and case["outcome"] == ["xla"]


def test_output_file_has_results_and_the_running_check(monkeypatch, tmp_path):
    """A kernel may hang until the process is killed; the file must name it."""
    seen = []

    def look():
        seen.append(json.loads((tmp_path / "check.json").read_text())["running"])
        return np.float32(1)

    monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "xla", Implementation(scaled_outputs))
    monkeypatch.setitem(recurrence.IMPLEMENTATIONS, "cpu", Implementation(calling(look)))
    monkeypatch.setattr(check, "DTYPES", {"float32": None})
    failed = check.run({"LSTM": SMALL_CASES["LSTM"]}, True, tmp_path / "check.json")
    assert failed == 1
    sizes = {"case": "LSTM", "units": 7, "batch": 3, "steps": 5, "dtype": "float32"}
    assert seen[0] == {**sizes, "implementation": "cpu", "outcome": "running"}
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["running"] is None and found["cases"] == list(SMALL_CASES)
    assert {r["implementation"]: r["outcome"] for r in found["results"]} == {
        "xla": "failed",
        "cpu": "passed",
    }


def test_unsupported_options_are_not_failures():
    result = check.refusal(check.make_layer(ODD, "cpu", jnp.bfloat16), ODD.batch)
    assert result["outcome"] == "not supported" and "float32" in result["problem"]
    assert check.refusal(check.make_layer(ODD, "cpu", None), ODD.batch) is None


@pytest.mark.parametrize("error, passes", [(1e-4, True), (0.1, False), (np.nan, False)])
def test_reference_scan_must_be_accurate(error, passes):
    """Otherwise all would pass, because allowed errors are multiples of the scan's errors."""
    expected = {"outputs": np.array([1.0, -2.0])}
    of_scan = check.relative_errors({"outputs": np.array([1 + error, -2])}, expected)
    assert (check.scan_problem(of_scan, "float32") is None) == passes


def test_errors_are_relative_to_the_largest_value():
    expected = {"gradients/a": np.array([1e-17]), "gradients/b": np.array([2.0, -50.0])}
    found = {"gradients/a": np.array([1e-3]), "gradients/b": np.array([2.5, -50.0])}
    # The first should be zero. Its error is relative to a thousandth of the largest gradient.
    errors = check.relative_errors(found, expected)
    assert errors == pytest.approx({"gradients/a": 1e-3 / 0.05, "gradients/b": 0.5 / 50})


EMULATED = [
    name if name == "masks" else pytest.param(name, marks=pytest.mark.long) for name in CASES
]


@pytest.mark.parametrize("name", EMULATED)
def test_emulated_cuda_kernel_passes(name):
    """The cases that run on a GPU, with smaller sizes."""
    case = CASES[name].shrunk(units=18, batch=40, steps=4)
    with emulation():
        found = list(check.check_case(case, ["float32", "bfloat16"], ["gpu"], repeats=2))
    outcomes = [r["outcome"] for r in found if r["outcome"] != "running"]
    assert outcomes == ["passed"] * 2, found


@pytest.mark.parametrize("name", CASES)
def test_layers_accept_the_inputs_of_all_cases(name):
    case = CASES[name]._replace(units=4, batch=5, steps=6)
    arrays = check.make_arrays(case)
    if case.padded:
        assert arrays["lengths"].max() == case.steps and arrays["lengths"].min() == 0
    layer = check.make_layer(case, "reference", None)
    shapes = jax.eval_shape(functools.partial(check.call, layer), arrays)
    assert shapes["outputs"].shape == (5, 6, 4)
    assert ("batch_stats" in shapes) == (case.layer is not LSTM)
    assert ("inputs" in shapes["gradients"]) == (not case.symbols)
