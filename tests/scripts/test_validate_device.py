import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bnlstm_jax import recurrence
from experiments.reporting import device_validation
from experiments.runtime import files
from experiments.runtime.errors import UserError
from scripts import validate_device

ROOT = Path(__file__).parents[2]


def validate(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return subprocess.run(
        [sys.executable, "-m", "scripts.validate_device", f"--output={folder}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


# ---- The steps.


def test_a_rehearsal_runs_every_step(tmp_path):
    folder = tmp_path / "new" / "folder"
    done = validate(folder, "--small", "--minutes=60", f"--data_dir={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    names = {"rates.json", "check.json", "benchmark.json", "training.json", "training.png"}
    assert {path.name for path in folder.iterdir()} == names | {"report.md"}
    report = (folder / "report.md").read_text()
    assert report in done.stdout
    assert report.startswith("# cpu\n") and "`cpu` was tried with small layers" in report
    assert "VALIDATED_UNITS" not in report and "`xla` " not in report.partition("## Steps")[0]
    for step in device_validation.SHARES:
        assert f"| {step} " in report
    findings = device_validation.read(folder)
    assert device_validation.sound(findings) == ["xla", "cpu"]
    assert set(findings["training"]["losses"]) == {
        "xla",
        "xla, parameters moved by a rounding",
        "cpu",
    }
    assert device_validation.judge(findings, "cpu").missing == ["training, 200 updates"]


@pytest.mark.long
def test_a_whole_validation_of_a_cpu(tmp_path, data_dir):
    """Its benchmark may not come to its end: text8 is large."""
    done = validate(tmp_path, "--minutes=12", f"--data_dir={data_dir}")
    findings = device_validation.read(tmp_path)
    assert set(findings) == set(device_validation.SHARES), done.stdout
    results = findings["check"]["results"]
    assert {r["case"] for r in results} == set(findings["check"]["cases"])
    assert not [r for r in results if r["outcome"] == "failed"]
    gains = device_validation.gains(findings)
    assert gains["cpu"] >= device_validation.LEAST_GAIN * gains["xla"] > 0
    assert {"pmnist", "ptb"} <= {r["size"] for r in findings["benchmark"]["results"]}


def run_steps(monkeypatch, folder, programs, minutes=1.0, only=None):
    """Runs the command with a program of one line of Python for each step; the exit status."""

    def command(step, given, folder, seconds):
        return [sys.executable, "-c", programs[step]]

    given = SimpleNamespace(
        minutes=minutes,
        only=only or list(programs),
        data_dir="",
        small=False,
        device=None,
        output=str(folder),
    )
    monkeypatch.setattr(validate_device, "command", command)
    monkeypatch.setattr(validate_device.signal, "signal", lambda *_: None)  # not this process'
    monkeypatch.setattr(validate_device.flags, "FLAGS", given)
    with pytest.raises(SystemExit) as ended:
        validate_device.main([])
    return ended.value.code


def outcomes(folder):
    report = (folder / "report.md").read_text()
    steps = report.partition("## Steps")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in steps.splitlines() if line.startswith("| ")]
    return {step.strip(): outcome.strip() for _, step, outcome, *_ in rows[1:]}


def test_a_step_that_fails_or_crashes_does_not_end_the_others(monkeypatch, tmp_path):
    programs = {
        "rates": "raise SystemExit(2)",
        "check": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "benchmark": "pass",
    }
    assert run_steps(monkeypatch, tmp_path, programs) == 1
    assert outcomes(tmp_path) == {
        "rates": "failed, exit status 2",
        "check": "ended by SIGSEGV",
        "benchmark": "done",
    }


def test_a_step_that_hangs_is_ended_and_its_results_count(monkeypatch, tmp_path):
    monkeypatch.setattr(validate_device, "SECONDS_TO_END", 0.5)
    rates = json.dumps({**RECORD, "rates": {}})
    hang = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    written = tmp_path / "rates.json"
    programs = {
        "rates": f"open({str(written)!r}, 'w').write({rates!r}); {hang}",
        "check": "pass",
    }
    start = time.monotonic()
    assert run_steps(monkeypatch, tmp_path, programs, minutes=0.3) == 0
    assert time.monotonic() - start < 60
    assert outcomes(tmp_path) == {"rates": "its time was up", "check": "done"}
    assert "## Rates" in (tmp_path / "report.md").read_text()


def test_results_of_an_earlier_call_are_kept_for_steps_that_are_not_run(monkeypatch, tmp_path):
    for step in ("rates", "check"):
        record = {**RECORD, "rates": {}, "results": []}
        files.write_json(tmp_path / f"{step}.json", record)
    assert run_steps(monkeypatch, tmp_path, {"check": "pass"}) == 0
    assert [path.name for path in tmp_path.glob("*.json")] == ["rates.json"]


def test_mistakes_are_found_before_anything_runs(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--only is 'chek', which is unknown: did you mean check"):
        run_steps(monkeypatch, tmp_path, {}, only=["chek"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: File exists"):
        run_steps(monkeypatch, tmp_path / "file", {"check": "pass"})


# ---- Verdicts.

RECORD = {
    "machine": {"device": "Some GPU", "platform": "gpu", "processor": "Some CPU", "cores": 16},
    "versions": {"jax": "0.11.2", "torch": None},
    "commit": "abc",
    "date": "2026-11-27T00:00:00+00:00",
}
UNITS = {"odd sizes": 7, "permuted MNIST": 100, "Penn Treebank": 1000, "text8": 2000}
SIZES = {"pmnist": 100, "ptb": 1000, "text8": 2000}


def make_findings(outcomes=(), times=(), gain=1.0, updates=300):
    """Findings of a kernel that passes all but text8, which does not fit, and is twice as fast."""
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


def test_validated_up_to_the_most_units_that_passed(monkeypatch):
    """text8, which does not fit, need not be measured."""
    findings = make_findings()
    assert "text8" in findings["benchmark"]["sizes"]
    verdict = device_validation.judge(findings, "gpu")
    assert verdict == (1000, [], [])
    words = device_validation.sentence("gpu", verdict, "Some GPU")
    assert '`"Some GPU": 1000,` (not there yet)' in words
    for now, expected in (
        (100, "(now 100)"),
        (1000, "So `VALIDATED_UNITS` has it"),
        (2000, "more"),
    ):
        monkeypatch.setitem(recurrence.VALIDATED_UNITS, "Some GPU", now)
        assert expected in device_validation.sentence("gpu", verdict, "Some GPU")


LIMITED = {
    "fails at 1000": ({"outcomes": {"Penn Treebank": "failed"}}, 100, "Penn Treebank, float32: a "),
    "fails at 7": ({"outcomes": {"odd sizes": "failed"}}, 0, "odd sizes, float32: a reason"),
    "slower at 1000": ({"times": {"ptb": 1.25}}, 100, "ptb, float32: .* takes 0.80 of its time"),
    "hardly learns": ({"gain": 0.5}, 0, "its loss fell by 0.45., that of xla by 0.90"),
    "trains to NaN": ({"gain": float("nan")}, 0, "its loss fell by nan"),
}


@pytest.mark.parametrize("changes, units, problem", LIMITED.values(), ids=LIMITED.keys())
def test_validated_below_what_failed(changes, units, problem):
    verdict = device_validation.judge(make_findings(**changes), "gpu")
    assert verdict.units == units
    assert len(verdict.problems) == 1
    words = device_validation.sentence("gpu", verdict, "Some GPU")
    assert re.search(problem, words)
    assert ('"Some GPU": 100,' in words) == (units == 100)
    assert ("`gpu` is not validated." in words) == (units == 0)


def test_as_fast_as_xla_but_for_noise_is_fast_enough():
    assert device_validation.judge(make_findings(times={"ptb": 1.03}), "gpu") == (1000, [], [])


def hang(findings):
    check = findings["check"]
    check["running"] = check["results"].pop()
    check["running"].update(case="Penn Treebank", units=1000)


def test_what_was_running_at_the_end_has_failed():
    findings = make_findings()
    hang(findings)
    assert device_validation.sound(findings) == ["xla"]
    verdict = device_validation.judge(findings, "gpu")
    assert verdict.units == 100
    assert verdict.problems == ["Penn Treebank, float32: it was running when its process ended"]


UNFINISHED = {
    "no checks": (lambda f: f.pop("check"), ["check of all cases, -"]),
    "checks cut off": (lambda f: f["check"]["cases"].append("masks"), ["check of masks, float32"]),
    "no benchmark": (lambda f: f.pop("benchmark"), ["benchmark of all sizes, -"]),
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
def test_not_validated_before_all_was_run(cut, missing):
    findings = make_findings()
    cut(findings)
    verdict = device_validation.judge(findings, "gpu")
    assert verdict.missing == missing
    words = device_validation.sentence("gpu", verdict, "Some GPU")
    assert words.startswith("`gpu` is not validated") and "VALIDATED_UNITS" not in words
    assert all(what in words for what in missing)


def test_findings_of_another_device_or_commit_do_not_count(tmp_path):
    findings = make_findings()
    findings["benchmark"]["commit"] = "def"
    findings["training"]["machine"] = {**RECORD["machine"], "device": "Another GPU"}
    for step, record in findings.items():
        files.write_json(tmp_path / f"{step}.json", record)
    assert set(device_validation.read(tmp_path)) == {"check"}


def test_kernels_that_failed_are_left_out():
    sound = device_validation.sound
    assert sound(make_findings()) == ["xla", "gpu"]
    assert sound(make_findings(outcomes={"odd sizes": "failed"})) == ["xla"]
    assert sound({}) is None


@functools.cache
def flags_of(module):
    asked = subprocess.run(
        [sys.executable, "-m", module, "--helpfull"], cwd=ROOT, capture_output=True, text=True
    )
    return set(re.findall(r"^  --(?:\[no\])?(\w+)", asked.stdout, re.MULTILINE))


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("step", device_validation.SHARES)
def test_commands_have_flags_that_there_are(step, small, tmp_path):
    files.write_json(tmp_path / "check.json", make_findings()["check"])
    given = SimpleNamespace(small=small, data_dir="some/folder")
    words = validate_device.command(step, given, tmp_path, 60.0)
    named = {word[2:].partition("=")[0] for word in words[3:]}
    assert {name for name in named if "." not in name} <= flags_of(words[2]) | {"config"}
    if step in ("benchmark", "training"):
        assert "--implementations=xla,gpu" in words
    assert ("--small" in words) == (small and step != "training")


def test_a_page_of_whatever_was_found():
    findings = make_findings(outcomes={"odd sizes": "failed"})
    page = device_validation.page(findings, [("check", "done", "9")], "the command")
    assert page.startswith("# Some GPU\n\n`the command`, commit abc")
    assert "- gpu, odd sizes, float32: failed: a reason" in page
    assert "- gpu, float32, not supported in 1 cases: a reason" in page
    assert "10%, permuted MNIST" in page
    assert "| BN-LSTM, gpu | 500.0" in page and "## Training: pMNIST" in page
    assert "## Steps" in device_validation.page({}, [("check", "its time was up", "9")], "")


def test_a_report_that_cannot_be_made_does_not_end_the_steps(monkeypatch, tmp_path):
    """A file that lacks what it should have."""
    rates = json.dumps(RECORD)
    written = tmp_path / "rates.json"
    programs = {"rates": f"open({str(written)!r}, 'w').write({rates!r})", "check": "pass"}
    assert run_steps(monkeypatch, tmp_path, programs) == 0
    assert "The report cannot be made" in (tmp_path / "report.md").read_text()


def test_data_that_are_missing_are_told_before_anything_runs(monkeypatch, tmp_path):
    def download(*_):
        raise UserError("MNIST cannot be downloaded")

    monkeypatch.setattr(validate_device.datasets, "load", download)
    with pytest.raises(UserError, match="MNIST cannot be downloaded"):
        run_steps(monkeypatch, tmp_path, {"rates": "1 / 0", "training": "1 / 0"})
    assert not list(tmp_path.iterdir())
