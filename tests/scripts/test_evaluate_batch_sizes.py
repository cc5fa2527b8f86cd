import jax.numpy as jnp
import numpy as np
import pytest

from experiments import datasets
from experiments.records.checkpoints import read_best
from experiments.runtime.errors import UserError
from experiments.tasks import load
from scripts import evaluate_batch_sizes


@pytest.fixture
def show(call_main):
    """Runs the command in this process; returns the cells of its table, by row."""

    def show(folder, sizes):
        given = {"workdir": str(folder), "data_dir": None, "batch_sizes": sizes}
        lines = call_main(evaluate_batch_sizes, **given).out.splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]

    return show


def test_rows_are_of_each_batch_size_and_of_population_statistics(digits_run, show):
    folder, config, results = digits_run
    header, _, fifty, all_of_them, population = show(folder, ["50", "250"])
    assert header == ["normalised by", "batch", "valid accuracy", "valid loss"]
    assert [fifty[1], all_of_them[1], population[1]] == ["50", "250", "any"]
    task = load(config)
    _, variables, _ = read_best(folder)
    labels = datasets.load("digits", config.data_dir).arrays["valid_labels"]
    for (_, _, accuracy, _), size in ((fifty, 50), (all_of_them, 250)):
        correct = []
        for start in range(0, 250, size):
            rows = slice(start, start + size)
            pixels = task.images["valid"][rows, :, None] / jnp.float32(task.max_pixel)
            logits, _ = task.model.apply(
                variables, pixels, use_running_average=False, mutable=["batch_stats"]
            )
            correct += list(logits.argmax(-1) == labels[rows])
        assert float(accuracy) == pytest.approx(np.mean(correct), abs=1e-4)
    (row,) = (
        row
        for row in results["rows"]
        if (row["split"], row["statistics"]) == ("valid", "population")
    )
    assert [float(cell) for cell in population[2:]] == pytest.approx(
        [row["accuracy"], row["loss"]], abs=1e-4
    )


@pytest.mark.parametrize("size", ["1", "251", "many", "-5"])
def test_batch_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(UserError, match=f"--batch_sizes.*{size}.* 250"):
        evaluate_batch_sizes.parse_sizes(["50", size], examples=250)
    assert evaluate_batch_sizes.parse_sizes(["2", "250"], examples=250) == [2, 250]


def test_a_model_without_batch_statistics_is_refused(runs, show):
    with pytest.raises(UserError, match="model without batch statistics"):
        show(runs / "lstm", ["50"])
