"""Tables and figures of made-up runs."""

import json

import numpy as np
import pytest

from experiments.records.runs import Experiment
from experiments.reporting import paper
from experiments.reporting.item import find
from experiments.reporting.items import ITEMS
from tests.scripts.made_up import write_run


def show(name, folder):
    return ITEMS[name].show(find([ITEMS[name]], folder), "data")


@pytest.fixture
def mnist_runs(tmp_path):
    """Three of the four runs of the table, one of them with two seeds."""
    for seed, value in ((1, 0.75), (2, 0.85)):
        points = {500: {"accuracy": value - 0.2}, 1000: {"accuracy": value - 0.1}}
        write_run(tmp_path, Experiment("pmnist", "bn_lstm"), seed, points, {"accuracy": value})
    points = {500: {"accuracy": 0.2}}
    write_run(tmp_path, Experiment("pmnist", "lstm"), 1, points, {"accuracy": 0.25})
    write_run(tmp_path, Experiment("mnist", "lstm"), 1, points)  # unfinished
    return tmp_path


def test_table_compares_final_results_with_the_paper(mnist_runs):
    table, figure = show("table_mnist", mnist_runs)
    assert figure is None and table.header[2] == "paper, test accuracy"
    pmnist = "pMNIST (released draw)"
    several, bn_lstm = "0.8000 (0.7500 to 0.8500)", "pmnist/bn_lstm"
    assert table.rows == [
        ["MNIST", "LSTM", "0.989", "-", "not run", "-", "-"],
        ["MNIST", "BN-LSTM", "0.990", "-", "not run", "-", "-"],
        [pmnist, "LSTM", "0.902", "0.2500", "500 of 100,000", "pmnist/lstm", "1:05 h"],
        [pmnist, "BN-LSTM", "0.954", several, "1,000 of 100,000", bn_lstm, "1:05 h, 1:05 h"],
    ]


def test_tables_leave_out_seeds_with_fewer_updates(mnist_runs):
    points = {500: {"accuracy": 0.1}}
    write_run(mnist_runs, Experiment("pmnist", "bn_lstm"), 3, points, {"accuracy": 0.3})
    table, _ = show("table_mnist", mnist_runs)
    assert table.rows[3][3:5] == ["0.8000 (0.7500 to 0.8500)", "1,000 of 100,000"]
    assert table.rows[3][6] == "1:05 h, 1:05 h"


def test_results_with_batch_input_statistics_have_their_own_row(tmp_path):
    experiment = Experiment("cnn_qa", "bn_e_star_star")
    run = write_run(tmp_path, experiment, 1, {500: {"error": 0.5}}, {"error": 0.4})
    results = json.loads((run / "results.json").read_text())
    row = {"split": "test", "statistics": "population_batch_inputs", "error": 0.37}
    results["rows"] += [row, row | {"split": "valid", "error": 0.9}]
    (run / "results.json").write_text(json.dumps(results))
    run = f"500 of {experiment.get_config().num_updates:,}", "cnn_qa/bn_e_star_star", "1:05 h"
    assert show("table_cnn", tmp_path).table.rows == [
        ["CNN", "LSTM", "0.450", "-", "not run", "-", "-"],
        ["CNN", "BN-e**", "0.363", "0.4000", *run],
        ["CNN", "BN-e**, input terms by the batch", "0.363", "0.3700", *run],
    ]


def test_resumed_run_keeps_the_update_count_of_its_results(mnist_runs):
    with (mnist_runs / "pmnist/lstm/seed_1/metrics.jsonl").open("a") as file:
        row = {"update": 50_000, "split": "valid", "statistics": "none", "accuracy": 0.8}
        file.write(json.dumps(row) + "\n")
    table, _ = show("table_mnist", mnist_runs)
    assert table.rows[2][3:5] == ["0.2500", "500 of 100,000"]


def test_curves_are_drawn_with_the_paper_curves(mnist_runs):
    write_run(mnist_runs, Experiment("pmnist", "bn_lstm"), 3, {1000: {"accuracy": 0.5}})
    table, figure = show("figure_pmnist", mnist_runs)
    whole, first = figure.axes
    assert whole.get_xlim() == (0, 100_000) and first.get_xlim() == (0, 1100)
    drawn = [line.get_xydata().T for line in first.lines]
    published = paper.curves("pmnist_valid_accuracy")[("bn_lstm",)]
    assert any(np.array_equal(line, published) for line in drawn)
    # The third seed has only the second of the two updates.
    means = [[500, 1000], [(0.55 + 0.65) / 2, (0.65 + 0.75 + 0.5) / 3]]
    assert any(line.shape == (2, 2) and np.allclose(line, means) for line in drawn)
    theirs = [f"{published[1, list(published[0]).index(update)]:.4f}" for update in (500, 1000)]
    assert table.rows[-2:] == [
        ["BN-LSTM", "valid", "500", theirs[0], "0.6000 (0.5500 to 0.6500)", "2"],
        ["BN-LSTM", "valid", "1,000", theirs[1], "0.6333 (0.5000 to 0.7500)", "3"],
    ]
    low, high = first.get_ylim()
    assert low < 0.2 and high > 0.75


def test_curves_skip_non_finite_values(tmp_path):
    points = {500: {"accuracy": 0.1}, 1000: {"accuracy": np.nan}, 1500: {"accuracy": 0.3}}
    write_run(tmp_path, Experiment("mnist", "lstm"), 1, points)
    table, figure = show("figure_mnist", tmp_path)
    drawn = [line.get_xydata().tolist() for line in figure.axes[1].lines]
    assert [[500, 0.1], [1500, 0.3]] in drawn
    assert [row[2] for row in table.rows] == ["500", "1,500"]


def test_curve_table_averages_complete_windows_of_each_seed(tmp_path):
    for seed, last in ((1, 4000), (2, 3000)):
        updates = range(500, last + 1, 500)
        points = {update: {"accuracy": update / 10_000} for update in updates}
        write_run(tmp_path, Experiment("mnist", "lstm"), seed, points)
    table, _ = show("figure_mnist", tmp_path)
    assert [(row[2], row[4], row[5]) for row in table.rows][-2:] == [
        ("1,500 to 2,000", "0.1750 (0.1750 to 0.1750)", "2"),
        ("2,500 to 4,000", "0.3250", "1"),
    ]


def test_curve_table_averages_over_doubling_windows(tmp_path):
    values = {500: 0.1, 1000: 0.2, 1500: 0.3, 2000: 0.5, 2500: 0.6, 3000: 0.7, 4500: 0.9}
    for seed, more in ((1, 0), (2, 0.01)):
        points = {update: {"accuracy": value + more} for update, value in values.items()}
        write_run(tmp_path, Experiment("mnist", "bn_lstm"), seed, points)
    table, _ = show("figure_mnist", tmp_path)
    updates, published = paper.curves("mnist_valid_accuracy")[("bn_lstm",)]
    theirs = dict(zip(updates, published, strict=True))
    assert table.header[2:5] == ["updates", "paper", "here"]
    windows = {"500": [500], "1,000": [1000], "1,500 to 2,000": [1500, 2000],
               "2,500 to 3,000": [2500, 3000], "4,500": [4500]}  # fmt: skip
    ours = [f"{mean:.4f} ({mean - 0.005:.4f} to {mean + 0.005:.4f})"
            for mean in (0.105, 0.205, 0.405, 0.655, 0.905)]  # fmt: skip
    assert [row[2:5] for row in table.rows] == [
        [name, f"{np.mean([theirs[update] for update in window]):.4f}", mean]
        for (name, window), mean in zip(windows.items(), ours, strict=True)
    ]


def test_run_without_validation_shows_training_curves(tmp_path):
    run = write_run(tmp_path, Experiment("ptb", "bn_lstm"), 1, {791: {"bits_per_character": 1.6}})
    training, _ = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(training + "\n")
    table, figure = show("figure_gamma_ptb", tmp_path)
    assert len(figure.axes) == 4
    assert [row[:3] for row in table.rows] == [["gamma 0.1", "train", "791"]]


def test_axis_limits_are_kept_before_the_first_validation(tmp_path):
    points = {400: {"bits_per_character": 1.8}}  # the paper's first validation is at 767
    run = write_run(tmp_path, Experiment("ptb", "bn_lstm"), 1, points)
    training, _ = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(training + "\n")
    _, figure = show("figure_gamma_ptb", tmp_path)
    assert {axes.get_ylim() for axes in figure.axes} == {ITEMS["figure_gamma_ptb"].ylim}


def test_curves_are_plotted_against_hours(mnist_runs):
    """In 3,900 seconds, the BN-LSTM makes 1,000 updates, and the LSTM makes 500."""
    table, figure = show("figure_pmnist_hours", mnist_runs)
    hours = 3900 / 3600
    drawn = [line.get_xydata().T for line in figure.axes[0].lines]
    np.testing.assert_allclose(drawn[0], [[hours], [0.2]])
    np.testing.assert_allclose(drawn[1], [[hours / 2, hours], [0.55, 0.65]])
    assert table.header == ["hours", "LSTM", "BN-LSTM"] and len(table.rows) == 6
    assert table.rows[-1] == ["1.08", "0.2000", "0.7000 (0.6500 to 0.7500)"]
    assert table.rows[2] == ["0.54", "-", "0.6000 (0.5500 to 0.6500)"]


def test_labels_of_hour_curves_name_the_implementations(tmp_path):
    for kind, seed, name in (("lstm", 1, "gpu"), ("lstm", 2, "cpu, AVX2"), ("bn_lstm", 1, "gpu")):
        test, run = {"accuracy": 0.7}, Experiment("pmnist", kind)
        write_run(tmp_path, run, seed, {500: {"accuracy": 0.6}}, test, implementation=name)
    table, figure = show("figure_pmnist_hours", tmp_path)
    labels = ["LSTM (cpu, AVX2; gpu)", "BN-LSTM (gpu)"]
    assert table.header == ["hours", *labels]
    assert [text.get_text() for text in figure.axes[0].get_legend().texts] == labels


def test_results_are_plotted_by_sequence_length(tmp_path):
    run = write_run(tmp_path, Experiment("ptb", "bn_lstm"), 1, {791: {"bits_per_character": 1.6}})
    row = {"split": "test", "reading": "segments of 300"}
    values = {"batch": 1.5, "population": 1.4, "running": 3.0}
    rows = [row | {"statistics": s, "bits_per_character": v} for s, v in values.items()]
    (run / "results.json").write_text(json.dumps({"updates": 791, "rows": rows}))
    table, figure = show("figure_ptb_lengths", tmp_path)
    measured = {row[0]: row[1:] for row in table.rows if row[3] != "-"}
    published = {name[0]: dict(points.T) for name, points in
                 paper.curves("ptb_test_bpc_by_length").items()}  # fmt: skip
    assert measured == {
        f"BN-LSTM, {label}": ["300", f"{published[f'bn_lstm_{name}'][300]:.4f}", value]
        for label, name, value in (
            ("population", "population_statistics", "1.4000"),
            ("batch statistics", "batch_statistics", "1.5000"),
        )
    }
    assert [[300, 1.4]] in [line.get_xydata().tolist() for line in figure.axes[0].lines]


def test_paper_curves_count_thousands_of_updates_from_zero():
    # The validation at plotted x = 203 is after 204,000 updates.
    published = paper.curves("cnn_4sentence_error")[("lstm", "valid")]
    assert paper.at(published, 350_000 + 1000) == pytest.approx(0.603, abs=5e-4)


@pytest.mark.parametrize("name", [name for name in ITEMS if name != "figure_gradient_norm"])
def test_items_without_runs_show_only_paper_results_or_nothing(name, tmp_path):
    table, figure = show(name, tmp_path)
    if name.endswith("_hours") or name == "figure_population_statistics":
        assert (table, figure) == (None, None)
    elif name.startswith("figure_"):
        assert all(axes.lines for axes in figure.axes)
    else:
        assert all(row[3] == "-" for row in table.rows)
    for experiment in ITEMS[name].experiments:
        assert experiment.get_config().num_updates > 1000
