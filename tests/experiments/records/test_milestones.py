import pytest

from experiments import train
from experiments.records import milestones
from experiments.records.milestones import Milestone
from experiments.records.runs import Experiment
from tests.scripts.made_up import write_run


@pytest.mark.parametrize(
    "metric, low, high, value, verdict",
    [
        ("accuracy", 0.4, 0.6, 0.55, "on track"),
        ("accuracy", 0.4, 0.6, 0.21, "on track"),  # below the range by less than its width
        ("accuracy", 0.4, 0.6, 0.19, "off track"),
        ("accuracy", 0.4, 0.6, 0.81, "better"),
        ("accuracy", 0.5, 0.5, 0.46, "on track"),  # below a single run by less than a tenth
        ("accuracy", 0.5, 0.5, 0.44, "off track"),
        ("accuracy", 0.4, 0.6, float("nan"), "off track"),
        ("error", 0.4, 0.6, 0.19, "better"),
        ("error", 0.4, 0.6, 0.81, "off track"),
    ],
)
def test_milestones_classify_metric_values(metric, low, high, value, verdict):
    told = Milestone(metric, low, high, 3).tell(value)
    assert told.startswith(f"{verdict}: {metric} ")


def test_milestones_are_the_range_of_runs_of_the_same_config(tmp_path, monkeypatch):
    monkeypatch.setattr(milestones, "RUNS", tmp_path)
    experiment = Experiment("pmnist", "bn_lstm")
    for seed, values in ((1, [0.5, 0.6, 0.7, 0.8]), (2, [0.53, 0.58, 0.7, 0.7])):
        points = {500 * (n + 1): {"accuracy": value} for n, value in enumerate(values)}
        points |= {500 * seed + 100: {"accuracy": 0.99}}  # the other run lacks this update
        write_run(tmp_path, experiment, seed, points)
    write_run(tmp_path, Experiment("pmnist", "lstm"), 1, {500: {"accuracy": 0.1}})
    config = experiment.get_config()
    config.seed, config.num_updates, config.data_dir = 7, 100, "elsewhere"
    assert milestones.of(config) == {
        500: Milestone("accuracy", 0.5, 0.53, 2),
        1000: Milestone("accuracy", 0.58, 0.6, 2),
        2000: Milestone("accuracy", 0.7, 0.8, 2),
    }
    config.model.initial_scale = 0.2
    assert milestones.of(config) == {}


def test_missing_results_folder_gives_no_milestones(tmp_path, monkeypatch):
    monkeypatch.setattr(milestones, "RUNS", tmp_path / "results")
    assert milestones.of(Experiment("pmnist", "bn_lstm").get_config()) == {}


def test_training_prints_milestone_verdicts(small_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(milestones, "RUNS", tmp_path / "runs")
    train.train(small_config, tmp_path / "runs" / "first")
    assert "on track" not in capsys.readouterr().out
    train.train(small_config, tmp_path / "second")
    assert "\n  on track: accuracy " in capsys.readouterr().out
