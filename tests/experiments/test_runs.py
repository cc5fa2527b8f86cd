import numpy as np

from experiments import runs
from experiments.runs import Experiment
from tests.scripts.made_up import write_run

PMNIST = Experiment("pmnist", "bn_lstm")
LARGE_GAMMA = Experiment("pmnist", "bn_lstm", (("model.initial_scale", 0.3),))


def test_runs_are_found_by_what_they_are(tmp_path):
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
    # Wherever they lie; and of two, the one that came further.
    elsewhere = write_run(tmp_path / "other", PMNIST, 1, {500: {"accuracy": 0.5}})
    assert runs.of(PMNIST, runs.find(tmp_path))[0].folder == elsewhere


def test_names_of_experiments():
    assert str(PMNIST) == "pmnist/bn_lstm"
    assert str(LARGE_GAMMA) == "pmnist/bn_lstm,initial_scale=0.3"
    assert str(Experiment("ptb:small", "lstm")) == "ptb_small/lstm"


def test_what_a_run_tells(tmp_path):
    validations = {500: {"accuracy": 0.5}, 1000: {"accuracy": 0.75}}
    run = runs.Run(write_run(tmp_path, PMNIST, 3, validations, {"accuracy": 0.7}))
    np.testing.assert_array_equal(run.curve("valid", "accuracy"), [[500, 1000], [0.5, 0.75]])
    assert (run.updates, run.seconds, run.results["update"]) == (1000, 3900, 1000)
    live = runs.Run(write_run(tmp_path, LARGE_GAMMA, 3))
    assert (live.updates, live.seconds, live.results) == (0, None, {})
    assert live.curve("valid", "accuracy").shape == (2, 0)
