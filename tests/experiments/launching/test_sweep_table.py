"""Tables of made-up sweeps."""

import csv

import pytest
from markdown_it import MarkdownIt

from configs import digits
from experiments.launching import sweep_table
from experiments.launching.sweeps import make_points
from experiments.runtime import files
from tests.scripts.made_up import ODD, results_of
from tests.test_trust import Outline


def make(folder, swept, kind="lstm"):
    config = digits.get_config()
    config.model.kind = kind
    return make_points(config, swept, folder)


def write_results(point, value, kind="lstm", lower_is_better=False):
    """Writes the results of a finished run."""
    statistics = ["none"] if kind == "lstm" else ["batch", "running", "population"]
    run = point.runs[kind]
    run.mkdir(parents=True, exist_ok=True)
    results = {
        "kind": kind,
        "update": 3,
        **results_of(point),
        "selection": "accuracy",
        "shown": ["accuracy"],
        "rows": [
            {"split": split, "statistics": name, "accuracy": value + shift + 0.1 * number}
            for number, name in enumerate(statistics)
            for split, shift in (("valid", 0), ("test", -0.25))
        ],
    }
    files.write_json(run / "results.json", results)
    files.write_json(run / "run.json", {"lower_is_better": lower_is_better})


def read(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_table_has_mean_and_standard_deviation_over_seeds(tmp_path):
    swept = [{"model.initial_scale": g, "seed": s} for g in (0.1, 0.3, 0.5) for s in (1, 2)]
    points = make(tmp_path, swept, "bn_lstm")
    for point, value in zip(points[:3], (0.5, 0.6, 0.7), strict=True):
        write_results(point, value, "bn_lstm")
    text = sweep_table.write(points, {"initial_scale=0.3,seed=2": "error: x"}, tmp_path)
    assert (tmp_path / "results.md").read_text() == text
    table, _, rest = text.partition("\n\n")
    assert table == (
        "| model   | model.initial_scale | seeds  | valid accuracy  | test accuracy   |\n"
        "|---------|---------------------|--------|-----------------|-----------------|\n"
        "| BN-LSTM | 0.3                 | 1 of 2 | 0.7000          | 0.6500          |\n"
        "| BN-LSTM | 0.1                 | 2 of 2 | 0.5500 ± 0.0707 | 0.5000 ± 0.0707 |\n"
        "| BN-LSTM | 0.5                 | 0 of 2 | -               | -               |"
    )
    assert "6 runs: 3 finished, 1 failed, 2 unfinished." in rest
    assert rest.endswith("\n- `initial_scale=0.3,seed=2` failed: error: x\n")

    rows = read(tmp_path)
    statuses = ["finished"] * 3 + ["failed"] + ["unfinished"] * 2
    assert [row["status"] for row in rows] == statuses
    assert rows[0] == {
        "model.initial_scale": "0.1",
        "seed": "1",
        "kind": "bn_lstm",
        "status": "finished",
        "selection": "accuracy",
        "validation": "0.5",
        "update": "3",
        "valid/batch/accuracy": "0.5",
        "test/batch/accuracy": "0.25",
        "valid/running/accuracy": "0.6",
        "test/running/accuracy": "0.35",
        "valid/population/accuracy": "0.7",
        "test/population/accuracy": "0.45",
        "workdir": "initial_scale=0.1,seed=1",
    }
    assert rows[4]["validation"] == "" and rows[4]["workdir"] == "initial_scale=0.5,seed=1"


def test_special_characters_are_kept_in_markdown_and_csv(tmp_path):
    points = make(tmp_path, [{"data_dir": ODD}, {"data_dir": "b"}])
    text = sweep_table.write(points, {points[0].name: f"error: {ODD}"}, tmp_path)
    shown = Outline(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))
    assert "".join(shown.text).count(ODD) == 2  # a value, and an error
    assert [row["data_dir"] for row in read(tmp_path)] == [ODD, "b"]


@pytest.mark.parametrize("lower_is_better, order", [(False, ["1", "0"]), (True, ["0", "1"])])
def test_best_point_is_listed_first(tmp_path, lower_is_better, order):
    points = make(tmp_path, [{"batch_size": 10}, {"batch_size": 20}])
    for value, point in enumerate(points):
        write_results(point, value, lower_is_better=lower_is_better)
    lines = sweep_table.write(points, {}, tmp_path).splitlines()[2:4]
    assert [line.split("|")[4].strip()[0] for line in lines] == order


def test_each_model_kind_has_its_own_row(tmp_path):
    (point,) = points = make(tmp_path, [{"batch_size": 10}], "lstm,bn_lstm")
    write_results(point, 0.25, "lstm")
    rows = sweep_table.rows(points, {}, tmp_path)
    statuses = [("lstm", "finished"), ("bn_lstm", "unfinished")]
    assert [(row["kind"], row["status"]) for row in rows] == statuses
    write_results(point, 0.5, "bn_lstm")
    # One column has the LSTM's test results, and the BN-LSTM's with population statistics.
    lines = sweep_table.write(points, {}, tmp_path).splitlines()
    assert lines[2].startswith("| BN-LSTM | 10         | 1 of 1 | 0.5000         | 0.4500 ")
    assert lines[3].startswith("| LSTM    | 10         | 1 of 1 | 0.2500         | 0.0000 ")
