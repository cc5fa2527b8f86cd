import json
from pathlib import Path

import pytest

from configs import digits
from experiments import train
from experiments.records import milestones
from experiments.records.milestones import Milestone
from experiments.records.runs import Experiment
from scripts import milestones as maker
from tests.scripts.made_up import write_run

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "low, high, paper, value, verdict",
    [
        (0.5, 0.6, None, 0.55, "on track"),
        (0.5, 0.6, None, 0.41, "on track"),  # by as much as the others lie apart
        (0.5, 0.6, None, 0.39, "off"),
        (0.5, 0.6, None, 0.71, "better"),
        (0.5, 0.5, None, 0.476, "on track"),  # one run says little: a twentieth
        (0.5, 0.5, None, 0.474, "off"),
        (0.5, 0.5, 0.6, 0.69, "on track"),  # the paper's counts as one of them
        (0.5, 0.6, None, float("nan"), "off"),
    ],
)
def test_verdicts(low, high, paper, value, verdict):
    told = Milestone("accuracy", low, high, 3, paper).tell(value)
    assert told.startswith(f"{verdict}: accuracy ")
    assert f"where 3 runs had {low:.3f} to {high:.3f}" in told
    assert ("the paper" in told) == (paper is not None)


@pytest.mark.parametrize("value, verdict", [(1.3, "better"), (1.5, "on track"), (1.7, "off")])
def test_lower_losses_are_better(value, verdict):
    told = Milestone("bits_per_character", 1.45, 1.55, 3, None).tell(value)
    assert told.startswith(f"{verdict}: bits per character ")


def test_they_are_for_configs_as_they_are():
    config = digits.get_config()
    config.model.kind = "bn_lstm"
    points = milestones.of(config)
    assert points and max(points) <= config.num_updates
    config.seed, config.num_updates, config.data_dir = 7, 100, "elsewhere"
    assert milestones.of(config) == points
    config.model.kind = "lstm"
    assert milestones.of(config) != points
    config.model.initial_scale = 0.2
    assert milestones.of(config) == {}


def test_they_are_what_runs_had(tmp_path):
    experiment = Experiment("pmnist", "bn_lstm")
    for seed, value in ((1, 0.5), (2, 0.53), (3, 0.52)):
        points = {500: {"accuracy": value}, 1000: {"accuracy": value + 0.1}}
        points |= {1500: {"accuracy": 0.7}} if seed == 1 else {}  # not all have come so far
        write_run(tmp_path, experiment, seed, points)
    (made,) = maker.make(tmp_path)
    assert (made["config"], made["kind"], made["metric"]) == ("pmnist", "bn_lstm", "accuracy")
    assert made["points"] == [
        {"update": 500, "low": 0.5, "high": 0.53, "seeds": 3, "paper": 0.5448},
        {"update": 1000, "low": 0.6, "high": 0.63, "seeds": 3, "paper": 0.656},
    ]


def test_the_file_is_of_the_runs_in_results():
    made = maker.make(ROOT / "results" / "runs")
    assert made == json.loads(milestones.PATH.read_text()), "call python -m scripts.milestones"


def test_a_run_tells_them(small_config, tmp_path, capsys, monkeypatch):
    points = {4: Milestone("accuracy", 0.0, 1.0, 3, None), 8: Milestone("loss", 0.1, 0.2, 3, None)}
    monkeypatch.setattr(milestones, "of", lambda _: points)
    train.train(small_config, tmp_path)
    said = capsys.readouterr().out
    assert "\n  on track: accuracy " in said and "\n  off: loss " in said
