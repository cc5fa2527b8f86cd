"""Points run on this machine, with small programs in place of runs."""

import json
import os
import signal
import sys

import pytest

from configs import digits
from experiments.launching import launchers, runner
from experiments.launching.launchers import Local
from experiments.launching.sweeps import make_points
from experiments.records import workdir
from experiments.runtime import files
from experiments.runtime.errors import Stopped, UserError
from tests.scripts.made_up import results_of

# Finishes a run in the folder, or fails, after two of these programs have started.
RUN = """
import pathlib, sys, time
folder, fails, results = pathlib.Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
folder.with_suffix(".started").touch()
while len(list(folder.parent.glob("*.started"))) < 2:
    time.sleep(0.02)
if fails:
    sys.exit("error: made up")
folder.mkdir()
(folder / "results.json").write_text(results)
"""
# Sends a signal to the sweep, and saves upon SIGTERM.
ENDLESS = """
import os, pathlib, signal, sys, time
folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def stop(*_):
    time.sleep(0.2)
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / "started").touch()
time.sleep(0.2)
if number:
    os.kill(os.getppid(), number)
time.sleep(60)
"""


class Observed(Local):
    """Records what is started, and how many points run at once."""

    interval = 0.02

    def __init__(self, folder, at_once):
        super().__init__(folder, at_once)
        self.started, self.most = [], 0

    def start(self, point, command):
        super().start(point, command)
        self.started.append(point.name)
        self.most = max(self.most, sum(p.poll() is None for p in self._processes.values()))


def make(folder, seeds):
    config = digits.get_config()
    config.model.kind = "lstm"
    return make_points(config, [{"seed": seed} for seed in seeds], folder)


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_jobs_limits_parallel_points_and_failed_points_rerun(tmp_path, capsys):
    points = make(tmp_path, range(4))
    points[1].folder.mkdir()
    files.write_json(points[1].folder / "results.json", results_of(points[1]))
    results = json.dumps(results_of(points[0]))
    commands = {p.name: python(RUN, p.folder, p.name == "seed=2", results) for p in points}
    written = []
    launcher = Observed(tmp_path, 2)
    errors = runner.run(points, commands, launcher, lambda errors: written.append({*errors}))
    assert launcher.started == ["seed=0", "seed=2", "seed=3"] and launcher.most == 2
    assert errors == {"seed=2": f"error: made up ({tmp_path}/jobs/seed=2.log)"}
    assert len(written) == 3 and written[-1] == {"seed=2"}
    said = capsys.readouterr().out
    assert "4 points: 1 finished" in said and "seed=2: failed: error: made up" in said

    again = Observed(tmp_path, 2)
    commands["seed=2"] = python(RUN, points[2].folder, False, results)
    assert runner.run(points, commands, again, lambda _: None) == {}
    assert again.started == ["seed=2"]


@pytest.mark.parametrize(
    "code, error",
    [
        ("print('update 100'); import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("print('update 100'); raise SystemExit(3)", "status 3"),
        ("print('update 100'); 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_point_error_excludes_progress_output(tmp_path, code, error):
    (point,) = make(tmp_path, [1])
    commands = {point.name: python(code)}
    errors = runner.run([point], commands, Observed(tmp_path, 1), lambda _: None)
    assert errors == {"seed=1": f"{error} ({tmp_path}/jobs/seed=1.log)"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_points_after_they_save(tmp_path, number):
    points = make(tmp_path, range(2))
    commands = {p.name: python(ENDLESS, tmp_path, int(number)) for p in points}
    launcher = Observed(tmp_path, 1)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught:
        runner.run(points, commands, launcher, lambda _: None)
    assert caught.value.status == 128 + number
    assert launcher.started == ["seed=0"] and (tmp_path / "saved").exists()
    assert signal.getsignal(number) == before


def test_signal_during_start_stops_the_point_with_closed_stderr(tmp_path, monkeypatch):
    start_process = launchers.subprocess.Popen

    def started(*arguments, **options):
        process = start_process(*arguments, **options)
        while not (tmp_path / "started").exists():
            pass
        signal.raise_signal(signal.SIGTERM)
        return process

    points = make(tmp_path, [1])
    commands = {point.name: python(ENDLESS, tmp_path, 0) for point in points}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as closed, monkeypatch.context() as patch:
        patch.setattr(launchers.subprocess, "Popen", started)
        patch.setattr(sys, "stderr", closed)
        with pytest.raises(Stopped):
            runner.run(points, commands, Observed(tmp_path, 1), lambda _: None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # takes the rest of the buffer
    assert (tmp_path / "saved").exists()


def test_launcher_errors_stop_points_after_they_save(tmp_path):
    class Refuses(Observed):
        def start(self, point, command):
            if self.started:
                while not (tmp_path / "started").exists():
                    pass
                raise UserError("made up")
            super().start(point, command)

    points = make(tmp_path, range(2))
    commands = {p.name: python(ENDLESS, tmp_path, 0) for p in points}
    with pytest.raises(UserError, match="made up"):
        runner.run(points, commands, Refuses(tmp_path, 2), lambda _: None)
    assert (tmp_path / "saved").exists()


def test_second_sweep_in_a_workdir_raises(tmp_path):
    with workdir.in_use(tmp_path), pytest.raises(UserError, match="--workdir"):
        runner.run(make(tmp_path, [1]), {}, Local(tmp_path, 1), lambda _: None)


def test_points_inherit_cuda_visible_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (point,) = points = make(tmp_path, [1])
    command = ["bash", "-c", "echo error: $CUDA_VISIBLE_DEVICES; exit 1"]
    errors = runner.run(points, {point.name: command}, Observed(tmp_path, 1), lambda _: None)
    assert errors[point.name].startswith("error: 3 ") and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
