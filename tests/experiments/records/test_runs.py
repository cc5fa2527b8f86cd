import json

import numpy as np
import pytest

from experiments.records import runs
from experiments.records.metrics import read_metrics
from experiments.records.runs import Experiment
from experiments.runtime import files
from tests.scripts.made_up import write_run

PMNIST = Experiment("pmnist", "bn_lstm")
LARGE_GAMMA = Experiment("pmnist", "bn_lstm", (("model.initial_scale", 0.3),))


def test_runs_are_found_by_experiment_in_any_subfolder(tmp_path):
    every = (PMNIST, LARGE_GAMMA, Experiment("pmnist", "lstm"), Experiment("ptb:small", "lstm"))
    for experiment in every:
        for seed in (2, 1):
            write_run(tmp_path, experiment, seed)
    found = runs.find(tmp_path)
    assert len(found) == 8
    for experiment in every:
        folders = [run.folder for run in runs.of(experiment, found)]
        assert folders == [tmp_path / str(experiment) / f"seed_{seed}" for seed in (1, 2)]
    assert runs.of(Experiment("mnist", "lstm"), found) == []
    # Runs are found in any subfolder. Of two with one seed, the one with more updates is returned.
    elsewhere = write_run(tmp_path / "other", PMNIST, 1, {500: {"accuracy": 0.5}})
    assert runs.of(PMNIST, runs.find(tmp_path))[0].folder == elsewhere


def test_experiment_names_have_config_kind_and_overrides():
    assert str(PMNIST) == "pmnist/bn_lstm"
    assert str(LARGE_GAMMA) == "pmnist/bn_lstm,initial_scale=0.3"
    assert str(Experiment("ptb:small", "lstm")) == "ptb_small/lstm"


def test_run_properties_are_read_from_its_files(tmp_path):
    validations = {500: {"accuracy": 0.5}, 1000: {"accuracy": 0.75}}
    run = runs.Run(write_run(tmp_path, PMNIST, 3, validations, {"accuracy": 0.7}))
    np.testing.assert_array_equal(run.curve("valid", "accuracy"), [[500, 1000], [0.5, 0.75]])
    assert (run.updates, run.seconds, run.results["update"]) == (1000, 3900, 1000)
    # A run that was stopped between two logs and evaluated.
    files.write_json(run.folder / "results.json", run.results | {"updates": 1030})
    # Killed later, or stopped; or it lost its last checkpoint, and was stopped earlier.
    for last, updates in (({}, 1030), ({"until": 1030}, 1030), ({"until": 900}, 900)):
        starts = [*run.record["starts"], last]
        files.write_json(run.folder / "run.json", run.record | {"starts": starts})
        stopped = runs.Run(run.folder)
        assert stopped.updates == updates and stopped.is_evaluated == (updates == 1030)
    live = runs.Run(write_run(tmp_path, LARGE_GAMMA, 3))
    assert (live.updates, live.seconds, live.results) == (0, None, {})
    assert live.curve("valid", "accuracy").shape == (2, 0)


@pytest.mark.parametrize("name", ["config.json", "run.json", "results.json"])
def test_damaged_run_is_reported_and_skipped(name, tmp_path, caplog):
    whole = write_run(tmp_path, PMNIST, 1, {500: {"accuracy": 0.5}}, {"accuracy": 0.5})
    damaged = write_run(tmp_path, PMNIST, 2, {500: {"accuracy": 0.5}}, {"accuracy": 0.5})
    (damaged / name).write_text("{")
    with caplog.at_level("WARNING"):
        assert [run.folder for run in runs.find(tmp_path)] == [whole]
    assert f"{damaged / name} is damaged" in caplog.text
    (damaged / name).unlink()
    (damaged / name).mkdir()  # not readable as a file
    with caplog.at_level("WARNING"):
        assert [run.folder for run in runs.find(tmp_path)] == [whole]
    assert "this run is left out" in caplog.messages[-1] and str(damaged) in caplog.messages[-1]


ROW = '{"update": 1, "split": "train", "statistics": "none", "loss": 1.0}'


@pytest.mark.parametrize("line", ["\0" * 20, ROW + ROW, ROW[:-9], "[1]", "{}", "\xff"])
def test_damaged_metrics_line_is_reported_and_skipped(line, tmp_path, caplog):
    text = f"{ROW}\n{line}\n{ROW}\n".encode("latin-1")
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with caplog.at_level("WARNING"):
        assert read_metrics(tmp_path) == [json.loads(ROW)] * 2
    assert f"{tmp_path / 'metrics.jsonl'}, line 2 is damaged" in caplog.text


def test_incomplete_last_line_is_ignored_silently(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text(f"{ROW}\n{ROW[:20]}")
    assert read_metrics(tmp_path) == [json.loads(ROW)]
    assert not caplog.text
