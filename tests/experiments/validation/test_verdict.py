"""Verdicts and the report, from made-up results."""

import re

import numpy as np
import pytest

from bnlstm_jax import recurrence
from experiments.runtime import files
from experiments.validation import report, verdict

RECORD = {
    "machine": {"device": "Some GPU", "platform": "gpu", "processor": "Some CPU", "cores": 16},
    "versions": {"jax": "0.11.2", "torch": None},
    "commit": "abc",
    "library": "0123",
    "date": "2026-11-27T00:00:00+00:00",
}
UNITS = {"odd sizes": 7, "permuted MNIST": 100, "Penn Treebank": 1000, "text8": 2000}
SIZES = {"pmnist": 100, "ptb": 1000, "text8": 2000}


def make_findings(outcomes=(), times=(), gain=1.0, updates=300):
    """Findings of a kernel twice as fast, which passes all cases but the unsupported text8."""
    outcomes = {"text8": "not supported", **dict(outcomes)}
    results = [
        {
            "case": case,
            "units": units,
            "batch": 64,
            "steps": 9,
            "dtype": "float32",
            "implementation": name,
            "outcome": outcomes.get(case, "passed") if name == "gpu" else "passed",
            "problem": "a reason",
            "share": 0.1,
            "nearest": "outputs",
        }
        for case, units in UNITS.items()
        for name in ("xla", "gpu")
    ]
    times = {"pmnist": 0.5, "ptb": 0.5, **dict(times)}
    benchmark = [
        {
            "size": size,
            "dtype": "float32",
            "pass": "update",
            "candidates": {"BN-LSTM, xla": {"median": 1.0}, "BN-LSTM, gpu": {"median": seconds}},
        }
        for size, seconds in times.items()
    ]
    sizes = {size: {"features": units} for size, units in SIZES.items()}
    falling = np.linspace(2, 1, updates)
    losses = {"xla": falling, "xla, moved": falling, "gpu": 2 - gain * (2 - falling)}
    planned = {"cases": list(UNITS), "dtypes": ["float32"], "running": None}
    return {
        "check": {**RECORD, **planned, "results": results},
        "benchmark": {
            **RECORD,
            "sizes": sizes,
            "results": benchmark,
            "flags": {"dtypes": ["float32"]},
        },
        "training": {
            **RECORD,
            "config": "pMNIST",
            "losses": {name: list(values) for name, values in losses.items()},
        },
    }


def test_kernel_is_validated_up_to_the_largest_passing_size(monkeypatch):
    """text8, which the kernel does not support, need not be measured."""
    findings = make_findings()
    assert "text8" in findings["benchmark"]["sizes"]
    found = verdict.judge(findings, "gpu")
    assert found == (1000, [], [])
    words = report.sentence("gpu", found, "Some GPU")
    assert '`"Some GPU": 1000,` (not listed yet)' in words
    for now, expected in (
        (100, "(now 100)"),
        (1000, "has that value"),
        (2000, "larger"),
    ):
        monkeypatch.setitem(recurrence.VALIDATED_UNITS, "Some GPU", now)
        assert expected in report.sentence("gpu", found, "Some GPU")


LIMITED = {
    "fails at 1000": ({"outcomes": {"Penn Treebank": "failed"}}, 100, "Penn Treebank, float32: a "),
    "fails at 7": ({"outcomes": {"odd sizes": "failed"}}, 0, "odd sizes, float32: a reason"),
    "slower at 1000": ({"times": {"ptb": 1.25}}, 100, "ptb, float32: .* takes 0.80 of the kernel"),
    "hardly learns": ({"gain": 0.5}, 0, "its loss fell by 0.45., that of xla by 0.90"),
    "trains to NaN": ({"gain": float("nan")}, 0, "its loss fell by nan"),
}


@pytest.mark.parametrize("changes, units, problem", LIMITED.values(), ids=LIMITED.keys())
def test_failures_limit_the_validated_units(changes, units, problem):
    found = verdict.judge(make_findings(**changes), "gpu")
    assert found.units == units
    assert len(found.problems) == 1
    words = report.sentence("gpu", found, "Some GPU")
    assert re.search(problem, words)
    assert ('"Some GPU": 100,' in words) == (units == 100)
    assert ("`gpu` is not validated." in words) == (units == 0)


def test_slowdown_within_noise_passes():
    assert verdict.judge(make_findings(times={"ptb": 1.03}), "gpu") == (1000, [], [])


def hang(findings):
    check = findings["check"]
    check["running"] = check["results"].pop()
    check["running"].update(case="Penn Treebank", units=1000)


def test_unfinished_check_counts_as_failed():
    findings = make_findings()
    hang(findings)
    assert verdict.sound(findings, "gpu", 1000) == ["xla"]
    found = verdict.judge(findings, "gpu")
    assert found.units == 100
    assert found.problems == ["Penn Treebank, float32: it was running when its process ended"]


UNFINISHED = {
    "no checks": (lambda f: f.pop("check"), ["check"]),
    "checks cut off": (lambda f: f["check"]["cases"].append("masks"), ["check of masks, float32"]),
    "no benchmark": (lambda f: f.pop("benchmark"), ["benchmark"]),
    "benchmark cut off": (
        lambda f: f["benchmark"]["results"].pop(),
        ["benchmark of ptb, float32"],
    ),
    "a dtype is missing": (
        lambda f: f["benchmark"]["flags"]["dtypes"].append("bfloat16"),
        ["benchmark of pmnist, bfloat16", "benchmark of ptb, bfloat16"],
    ),
    "no training": (lambda f: f.pop("training"), ["training, 200 updates"]),
    "not trained": (lambda f: f["training"]["losses"].pop("gpu"), ["training, 200 updates"]),
    "trained shortly": (
        lambda f: f.update(training=make_findings(updates=100)["training"]),
        ["training, 200 updates"],
    ),
}


@pytest.mark.parametrize("cut, missing", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_missing_steps_prevent_validation(cut, missing):
    findings = make_findings()
    cut(findings)
    found = verdict.judge(findings, "gpu")
    assert found.missing == missing
    words = report.sentence("gpu", found, "Some GPU")
    assert words.startswith("`gpu` is not validated") and "VALIDATED_UNITS" not in words
    assert all(what in words for what in missing)


def test_findings_of_another_device_or_library_are_ignored(tmp_path):
    findings = make_findings()
    findings["benchmark"]["library"] = "4567"
    findings["training"]["machine"] = {**RECORD["machine"], "device": "Another GPU"}
    for step, record in findings.items():
        files.write_json(tmp_path / f"{step}.json", record)
    assert set(verdict.read(tmp_path)) == {"check"}


def test_findings_without_a_library_digest_are_matched_by_commit(tmp_path):
    findings = make_findings()
    findings["benchmark"]["commit"] = "def"
    for step, record in findings.items():
        del record["library"]
        files.write_json(tmp_path / f"{step}.json", record)
    assert set(verdict.read(tmp_path)) == {"check", "training"}


def test_report_names_every_commit():
    findings = make_findings()
    findings["benchmark"]["commit"] = "def"
    assert "`the command`, commit abc, def, 2026-" in report.page(findings, [], "the command")


def test_kernels_are_excluded_from_the_size_of_a_failed_check_on():
    assert verdict.sound(make_findings(), "gpu", 100) == ["xla", "gpu"]
    failed = make_findings(outcomes={"permuted MNIST": "failed"})
    assert verdict.sound(failed, "gpu", 99) == ["xla", "gpu"]
    assert verdict.sound(failed, "gpu", 100) == ["xla"]
    none = make_findings(outcomes=dict.fromkeys(UNITS, "not supported"))
    assert verdict.sound(none, "gpu", 1) == ["xla"]
    assert verdict.sound({}, "gpu", 100) == ["xla", "gpu"]


def test_report_has_a_section_per_executed_step():
    findings = make_findings(outcomes={"odd sizes": "failed"})
    page = report.page(findings, [("check", "done", "9")], "the command")
    assert page.startswith("# Some GPU\n\n`the command`, commit abc")
    assert "- gpu, odd sizes, float32: failed: a reason" in page
    assert "- gpu, float32, not supported in 1 cases: a reason" in page
    assert "10%, permuted MNIST" in page
    assert "| BN-LSTM, gpu | 500.0" in page and "## Training: pMNIST" in page
    assert "## Steps" in report.page({}, [("check", "timed out", "9")], "")
