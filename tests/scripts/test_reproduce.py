import re
import shlex
import sys

import pytest

from experiments.records.runs import Experiment
from experiments.reporting.items import ITEMS
from experiments.runtime.errors import UserError
from scripts import reproduce
from tests.scripts.made_up import ODD, write_run

# Replaces `experiments.main`: copies a finished run, or fails.
STAND_IN = """
import shutil, sys
if sys.argv[1].endswith("/lstm/seed_1"):
    sys.exit("error: made up")
shutil.copytree(*sys.argv[1:])
"""


@pytest.fixture
def call(call_main, tmp_path):
    """Runs the command in this process; returns its output."""
    given = {"budget": "minutes", "seeds": 1, "data_dir": "data", "output": None, "dry_run": False}
    given |= {"workdir": str(tmp_path / ODD), "launcher": "local", "jobs": 2}
    return lambda *arguments, **others: call_main(reproduce, *arguments, **given | others).out


def test_dry_run_prints_commands_of_missing_runs(call, tmp_path):
    printed = call("table_mnist", seeds=2, dry_run=True)
    lines = [line for line in printed.splitlines() if line and line[0] != "#"]
    assert len(lines) == 8 and len(set(lines)) == 8
    words = shlex.split(lines[-1])
    assert words[:4] == [sys.executable, "-m", "experiments.main", "--config=configs/pmnist.py"]
    assert f"--workdir={tmp_path / ODD}/pmnist/bn_lstm/seed_2" in words
    assert {"--config.seed=2", "--config.num_updates=500", "--config.model.kind=bn_lstm"} <= {
        *words
    }
    assert list(tmp_path.iterdir()) == []
    # A run is skipped if it has more updates than the budget, here 500 or the paper's number.
    write_run(tmp_path / ODD, Experiment("mnist", "lstm"), 1, {600: {"accuracy": 0.2}})
    for budget, number in (("minutes", 3), ("full", 4)):
        printed = call("table_mnist", budget=budget, dry_run=True)
        assert printed.count("experiments.main") == number


def test_runs_are_launched_as_sweep_points(call, tmp_path, monkeypatch, capsys):
    folder, finished = tmp_path / ODD, tmp_path / "finished"
    for config in ("mnist", "pmnist"):
        experiment = Experiment(config, "bn_lstm")
        write_run(finished, experiment, 1, {500: {"accuracy": 0.5}}, {"accuracy": 0.7})

    def command_of(point, *_):
        places = [str(place / point.name) for place in (finished, folder)]
        return [sys.executable, "-c", STAND_IN, *places]

    monkeypatch.setattr(reproduce.runner, "command_of", command_of)
    with pytest.raises(SystemExit) as caught:
        call("table_mnist", output=str(tmp_path))
    assert caught.value.code == "error: 2 of 4 points failed"
    said = capsys.readouterr()
    assert "mnist/bn_lstm/seed_1: finished, " in said.out
    log = folder / "jobs/pmnist/lstm/seed_1.log"
    assert f"pmnist/lstm/seed_1: failed: error: made up ({log})" in said.out
    table = (tmp_path / "table_mnist.md").read_text()
    assert table in said.out and re.sub(" +", " ", table).count("| 0.7000 | 500 of 100,000 |") == 2


def test_unwritable_output_raises_before_runs_start(call, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        call("table_mnist", output=str(tmp_path / "file"))
    assert not (tmp_path / ODD).exists()


def test_table_and_figure_of_existing_runs_are_written(call, tmp_path):
    points = {500: {"accuracy": 0.55}, 1000: {"accuracy": 0.65}}
    write_run(tmp_path / ODD, Experiment("pmnist", "bn_lstm"), 1, points)
    printed = call("figure_pmnist", budget="none", output=str(tmp_path / "new"))
    assert (tmp_path / "new/figure_pmnist.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "new/figure_pmnist.md").read_text()
    assert text in printed and "![Permuted MNIST" in text
    assert "| BN-LSTM | valid | 1,000   | 0.6560 | 0.6500 | 1     |" in text


def test_item_names_are_listed_and_typos_get_suggestions(call):
    assert [line.split()[0] for line in call().splitlines()] == list(ITEMS)
    with pytest.raises(UserError, match="figure_pmnist"):
        call("figure_pmnst")
