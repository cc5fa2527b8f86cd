import jax
import numpy as np
import pytest

from configs import digits
from experiments import datasets
from scripts import compare_implementations

RUNS = compare_implementations.named_runs(["reference", "xla", "cpu"], ["xla"])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    datasets.load("digits", folder)
    config = digits.get_config()
    config.data_dir, config.model.kind, config.model.features = folder, "bn_lstm", 6
    comparison = compare_implementations.Comparison(config, RUNS)
    comparison.train_for(3, minutes=None)
    return comparison.losses


def test_trains_the_same_model_by_each(found):
    assert list(found) == list(RUNS)
    apart = compare_implementations.differences(found)
    # Losses near 2.3: rounding of an average of a batch, grown through two updates.
    assert apart["xla"].max() < 1e-4 and apart["cpu"].max() < 1e-4
    # Products of operands with 8 bits show in the first loss already.
    assert apart["xla, bfloat16"][0] > 1e-6 > apart["xla"][0]


def test_table_and_figure(found):
    lines = compare_implementations.table(found).splitlines()
    assert len(lines) == 2 + len(found) - 1
    assert lines[0].split("|")[-2].strip() == "3"
    figure = compare_implementations.draw(found, "a title")
    assert [len(axes.lines) for axes in figure.axes] == [len(found), len(found) - 1]


def test_parameters_are_moved_by_about_one_rounding():
    params = {"kernel": np.float32(np.random.default_rng(0).normal(size=(50, 20)))}
    moved = jax.device_get(compare_implementations.moved(params))["kernel"]
    steps = np.abs(moved - params["kernel"]) / np.spacing(np.abs(params["kernel"]))
    assert steps.max() <= 2 and (steps > 0).all()
