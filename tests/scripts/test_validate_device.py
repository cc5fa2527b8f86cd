import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from experiments.benchmarking import programs, timing
from experiments.runtime import files
from experiments.runtime.errors import UserError
from experiments.validation import verdict
from scripts import validate_device
from tests.experiments.validation.test_verdict import RECORD

ROOT = Path(__file__).parents[2]


def validate(folder, *arguments):
    command = [sys.executable, "-m", "scripts.validate_device", f"--output={folder}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# ---- The real steps.


def test_single_step_writes_its_file_and_the_report(tmp_path):
    folder = tmp_path / "new" / "folder"
    done = validate(folder, "--small", "--device=cpu", "--only=rates")
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in folder.iterdir()} == {"rates.json", "report.md"}
    report = (folder / "report.md").read_text()
    assert report in done.stdout
    assert report.startswith("# cpu\n") and "| copy " in report and "| rates | done " in report


def test_steps_write_their_findings(monkeypatch, tmp_path):
    """The steps check and benchmark, each on one small case."""
    monkeypatch.setattr(timing, "use_device", lambda kind: jax.devices(kind)[0])
    monkeypatch.setattr(programs, "SIZES", {"pmnist": programs.SIZES["pmnist"]})
    given = SimpleNamespace(device="cpu", small=True, cases=["LSTM"], data_dir=str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        validate_device.run_step("check", given, tmp_path, 1.0)
    assert ended.value.code == 0
    cache = jax.config.jax_enable_compilation_cache
    validate_device.run_step("benchmark", given, tmp_path, 1.0)
    jax.config.update("jax_enable_compilation_cache", cache)
    findings = verdict.read(tmp_path)
    assert {r["case"] for r in findings["check"]["results"]} == {"LSTM"}
    (result,) = findings["benchmark"]["results"]
    assert {"BN-LSTM, xla", "BN-LSTM, cpu"} <= result["candidates"].keys()
    missing = verdict.judge(findings, "cpu").missing
    assert "check of masks, float32" in missing and "training, 200 updates" in missing


@pytest.mark.long
def test_small_validation_runs_every_step(tmp_path):
    done = validate(tmp_path, "--small", "--minutes=60", f"--data_dir={tmp_path}/data")
    assert (done.returncode, done.stderr) == (0, "")
    names = {f"{step}.json" for step in verdict.SHARES}
    assert {path.name for path in tmp_path.iterdir()} == names | {"report.md", "data"}
    report = (tmp_path / "report.md").read_text()
    assert "`cpu` ran with small layers" in report and "VALIDATED_UNITS" not in report
    findings = verdict.read(tmp_path)
    assert verdict.sound(findings, "cpu", 100) == ["xla", "cpu"]
    assert {len(losses) for losses in findings["training"]["losses"].values()} == {20}
    assert verdict.judge(findings, "cpu").missing == ["training, 200 updates"]


@pytest.mark.long
def test_full_validation_passes_on_a_cpu(tmp_path, data_dir):
    """The benchmark may run out of time: text8 is large. Training uses all of its time."""
    done = validate(tmp_path, "--minutes=60", "--only=rates,check")
    assert (done.returncode, done.stderr) == (0, "")
    validate(tmp_path, "--minutes=15", "--only=benchmark")
    done = validate(tmp_path, "--minutes=10", "--only=training", f"--data_dir={data_dir}")
    findings = verdict.read(tmp_path)
    assert set(findings) == set(verdict.SHARES), done.stdout
    results = findings["check"]["results"]
    assert {r["case"] for r in results} == set(findings["check"]["cases"])
    assert not [r for r in results if r["outcome"] == "failed"]
    gains = verdict.gains(findings)
    assert gains["cpu"] >= verdict.LEAST_GAIN * gains["xla"] > 0
    assert {"pmnist", "ptb"} <= {r["size"] for r in findings["benchmark"]["results"]}


# ---- Made-up steps.


def call(monkeypatch, folder, programs, **given):
    """Runs the command with a line of Python in place of each step; returns the exit status."""
    fields = {
        "minutes": 1.0,
        "only": list(programs),
        "step": None,
        "cases": None,
        "data_dir": "",
        "small": False,
        "device": None,
        "output": str(folder),
    }
    monkeypatch.setattr(
        validate_device, "command", lambda step, *_: [sys.executable, "-c", programs[step]]
    )
    monkeypatch.setattr(validate_device.signal, "signal", lambda *_: None)  # keeps handlers
    monkeypatch.setattr(validate_device.flags, "FLAGS", SimpleNamespace(**fields | given))
    with pytest.raises(SystemExit) as ended:
        validate_device.main([])
    return ended.value.code


def outcomes(folder):
    report = (folder / "report.md").read_text()
    steps = report.partition("## Steps")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in steps.splitlines() if line.startswith("| ")]
    return {step.strip(): outcome.strip() for _, step, outcome, *_ in rows[1:]}


def writing(folder, step, record):
    """A program that writes a step's file."""
    return f"open({str(folder / step)!r} + '.json', 'w').write({json.dumps(record)!r})"


def test_failed_or_crashed_step_does_not_stop_the_others(monkeypatch, tmp_path):
    steps = {
        "rates": "raise SystemExit(1)",
        "check": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "benchmark": "pass",
    }
    assert call(monkeypatch, tmp_path, steps) == 1
    assert outcomes(tmp_path) == {
        "rates": "failed, exit status 1",
        "check": "ended by SIGSEGV",
        "benchmark": "done",
    }


def test_user_error_in_a_step_stops_all_steps(monkeypatch, tmp_path):
    assert call(monkeypatch, tmp_path, {"rates": "raise SystemExit(2)", "check": "1 / 0"}) == 2


def test_hanging_step_is_killed_and_its_results_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(validate_device, "SECONDS_TO_END", 0.5)
    write = writing(tmp_path, "rates", {**RECORD, "rates": {}})
    hang = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    steps = {"rates": f"{write}; {hang}", "check": "pass"}
    assert call(monkeypatch, tmp_path, steps, minutes=0.3) == 0
    assert outcomes(tmp_path) == {"rates": "timed out", "check": "done"}
    assert "## Rates" in (tmp_path / "report.md").read_text()


def test_results_of_unselected_steps_are_kept(monkeypatch, tmp_path):
    for step in ("rates", "check"):
        files.write_json(tmp_path / f"{step}.json", {**RECORD, "rates": {}, "results": []})
    assert call(monkeypatch, tmp_path, {"check": "pass"}) == 0
    assert [path.name for path in tmp_path.glob("*.json")] == ["rates.json"]


def test_report_failure_does_not_stop_the_steps(monkeypatch, tmp_path):
    """The file of the step rates lacks a field."""
    steps = {"rates": writing(tmp_path, "rates", RECORD), "check": "pass"}
    assert call(monkeypatch, tmp_path, steps) == 0
    assert "The report cannot be made" in (tmp_path / "report.md").read_text()


def test_invalid_arguments_raise_before_any_step_runs(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--only.* did you mean check"):
        call(monkeypatch, tmp_path, {}, only=["chek"])
    with pytest.raises(UserError, match=r"--cases.* did you mean masks"):
        call(monkeypatch, tmp_path, {"check": "1 / 0"}, cases=["mask"])
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        call(monkeypatch, tmp_path / "file", {"check": "1 / 0"})


def test_missing_data_raises_before_any_step_runs(monkeypatch, tmp_path):
    def download(*_):
        raise UserError("MNIST cannot be downloaded")

    monkeypatch.setattr(validate_device.datasets, "load", download)
    with pytest.raises(UserError, match="MNIST cannot be downloaded"):
        call(monkeypatch, tmp_path, {"rates": "1 / 0", "training": "1 / 0"})
    assert not list(tmp_path.iterdir())
