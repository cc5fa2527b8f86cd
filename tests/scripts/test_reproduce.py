import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.records import runs
from experiments.records.runs import Experiment
from experiments.reporting import curves, items, paper
from scripts import reproduce
from tests.scripts.made_up import ODD, write_run

ROOT = Path(__file__).parents[2]
ITEMS = items.items("data")


def call(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scripts.reproduce", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def found(item, folder):
    every = runs.find(folder)
    return {experiment: runs.of(experiment, every) for experiment in item.experiments}


@pytest.fixture
def mnist_runs(tmp_path):
    """Three of the four runs of the table, one of them with two seeds."""
    for seed, value in ((1, 0.75), (2, 0.85)):
        points = {500: {"accuracy": value - 0.2}, 1000: {"accuracy": value - 0.1}}
        write_run(tmp_path, Experiment("pmnist", "bn_lstm"), seed, points, {"accuracy": value})
    points = {500: {"accuracy": 0.2}}
    write_run(tmp_path, Experiment("pmnist", "lstm"), 1, points, {"accuracy": 0.25})
    write_run(tmp_path, Experiment("mnist", "lstm"), 1, points)  # goes on
    return tmp_path


def test_the_table_of_mnist(mnist_runs):
    table, figure = ITEMS["table_mnist"].show(found(ITEMS["table_mnist"], mnist_runs))
    assert figure is None
    rows = [re.sub(r"\s+", " ", line).strip("| ") for line in table.splitlines()[2:]]
    assert rows == [
        "MNIST | LSTM | 0.989 | - | not run | 0",
        "MNIST | BN-LSTM | 0.990 | - | not run | 0",
        "pMNIST (released draw) | LSTM | 0.902 | 0.2500 | 500 of 100,000 | 1",
        "pMNIST (released draw) | BN-LSTM | 0.954 | 0.8000 (0.7500 to 0.8500) "
        "| 1,000 of 100,000 | 2",
    ]


def test_curves_lie_over_the_papers(mnist_runs):
    item = ITEMS["figure_pmnist"]
    table, figure = item.show(found(item, mnist_runs))
    whole, first = figure.axes
    assert whole.get_xlim() == (0, 100_000) and first.get_xlim() == (0, 1100)
    published = paper.curves("pmnist_valid_accuracy")[("bn_lstm",)]
    drawn = [line.get_xydata().T for line in first.lines]
    assert any(np.array_equal(line, published) for line in drawn)
    assert any(np.allclose(line, [[500, 1000], [0.6, 0.7]]) for line in drawn if line.shape[1] == 2)
    (row,) = (line for line in table.splitlines() if "BN-LSTM" in line and "1,000" in line)
    assert "0.6560" in row and "0.7000 (0.6500 to 0.7500)" in row
    low, high = first.get_ylim()
    assert low < 0.2 and high > 0.75


def test_curves_by_hours(mnist_runs):
    """3,900 seconds are for 1,000 updates of the BN-LSTM, and for 500 of the LSTM."""
    item = ITEMS["figure_pmnist_hours"]
    table, figure = item.show(found(item, mnist_runs))
    hours = 3900 / 3600
    drawn = [line.get_xydata().T for line in figure.axes[0].lines]
    np.testing.assert_allclose(drawn[0], [[hours], [0.2]])
    np.testing.assert_allclose(drawn[1], [[hours / 2, hours], [0.55, 0.65]])
    header, _, *rows = [re.sub(r"\s+", " ", line).strip("| ") for line in table.splitlines()]
    assert header == "hours | LSTM | BN-LSTM" and len(rows) == 6
    assert rows[-1] == "1.08 | 0.2000 | 0.7000 (0.6500 to 0.7500)"
    assert rows[2] == "0.54 | - | 0.6000 (0.5500 to 0.6500)"


def test_seeds_that_came_as_far_as_one_another(mnist_runs):
    experiment = Experiment("pmnist", "bn_lstm")
    write_run(mnist_runs, experiment, 3, {1000: {"accuracy": 0.5}})
    line = items.lines_of("pmnist_valid_accuracy", "pmnist", "accuracy")[1]
    updates, values = curves.points_of(line, found(ITEMS["figure_pmnist"], mnist_runs))
    np.testing.assert_array_equal(updates, [1000])
    np.testing.assert_allclose(values, [[0.65], [0.75], [0.5]])


def test_the_paper_counts_thousands_of_updates_from_zero():
    line = items.reader_lines("cnn_4sentence_error", "cnn_qa:four_sentences", ("lstm",))[0]
    # The validation at plotted x = 203 is after 204,000 updates.
    assert paper.at(line.published, 350_000 + 1000) == pytest.approx(0.603, abs=5e-4)


@pytest.mark.parametrize("name", [n for n in ITEMS if n not in ("figure_gradient_norm",)])
def test_every_item_shows_something_or_nothing(name, tmp_path):
    table, figure = ITEMS[name].show(found(ITEMS[name], tmp_path))
    assert isinstance(table, str)
    if name.endswith("_hours"):
        assert (table, figure) == ("", None)
    if figure is not None and name != "figure_tanh":
        assert all(axes.lines for axes in figure.axes)  # the paper's
    for experiment in ITEMS[name].experiments:
        assert experiment.get_config().num_updates > 1000


def test_commands_make_the_runs_and_go_on(tmp_path):
    done = call("table_mnist", "--seeds=2", "--dry_run", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line and line[0] != "#"]
    assert len(lines) == 8 and len(set(lines)) == 8
    words = shlex.split(lines[-1])
    assert words[:4] == [sys.executable, "-m", "experiments.main", "--config=configs/pmnist.py"]
    assert f"--workdir={tmp_path}/pmnist/bn_lstm/seed_2" in words
    assert {"--config.seed=2", "--config.num_updates=500", "--config.model.kind=bn_lstm"} <= {
        *words
    }
    assert list(tmp_path.iterdir()) == []
    # One that came further is left alone; the whole of it is more than that.
    write_run(tmp_path, Experiment("mnist", "lstm"), 1, {600: {"accuracy": 0.2}})
    for budget, number in (("minutes", 3), ("full", 4)):
        done = call("table_mnist", f"--budget={budget}", "--dry_run", f"--workdir={tmp_path}")
        assert done.stdout.count("experiments.main") == number


# In place of `experiments.main`: a run of 500 updates, or a mistake.
STAND_IN = """
import sys
from pathlib import Path
from experiments.records.runs import (Experiment)
from tests.scripts.made_up import ODD, write_run

config, kind, folder = sys.argv[1:]
if kind == "lstm":
    sys.exit("error: made up")
write_run(Path(folder), Experiment(config, kind), 1, {500: {"accuracy": 0.5}}, {"accuracy": 0.7})
"""


def test_runs_are_launched_as_those_of_a_sweep(tmp_path, monkeypatch, capsys, call_main):
    folder = tmp_path / ODD

    def command_of(point, config_file, overrides):
        config, kind = Path(config_file).stem, point.fields["model.kind"]
        return [sys.executable, "-c", STAND_IN, config, kind, str(folder)]

    monkeypatch.setattr(reproduce.runner, "command_of", command_of)
    given = {"budget": "minutes", "seeds": 1, "data_dir": "data", "workdir": str(folder)}
    given |= {"output": str(tmp_path), "dry_run": False}
    given |= {"launcher": "local", "jobs": 2}
    with pytest.raises(SystemExit) as caught:
        call_main(reproduce, "table_mnist", **given)
    assert caught.value.code == "error: 2 of 4 points failed"
    said = capsys.readouterr()
    assert "mnist/bn_lstm/seed_1: finished, " in said.out
    log = folder / "jobs/pmnist/lstm/seed_1.log"
    assert f"pmnist/lstm/seed_1: failed: error: made up ({log})" in said.out
    table = (tmp_path / "table_mnist.md").read_text()
    assert table in said.out and re.sub(" +", " ", table).count("| 0.7000 | 500 of 100,000 |") == 2


def test_runs_that_exist_are_shown(mnist_runs, tmp_path):
    output = tmp_path / "output"
    done = call("figure_pmnist", "--budget=none", f"--workdir={mnist_runs}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert (output / "figure_pmnist.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "figure_pmnist.md").read_text() in done.stdout


def test_mistakes_are_one_line():
    done = call("figure_pmnst")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "did you mean figure_pmnist?" in done.stderr
    listed = call().stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(ITEMS)
