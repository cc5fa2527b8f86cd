import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import digits
from experiments.validation import training


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """The losses of three updates, after which time is up."""
    config = digits.get_config()
    config.data_dir = str(tmp_path_factory.mktemp("data"))
    config.model.kind, config.model.features = "bn_lstm", 6
    clock = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        return training.compare(config, ["xla", "cpu"], updates=100, seconds=2.5)


def test_implementations_train_the_same_model(losses):
    assert list(losses) == ["xla", f"xla, {training.MOVED}", "cpu"]
    assert {len(values) for values in losses.values()} == {3}
    apart = training.differences(losses)
    # Losses are near 2.3. Two updates amplify the rounding of a batch's mean.
    assert 0 < apart["cpu"].max() < 1e-4
    assert 0 < apart[f"xla, {training.MOVED}"].max() < 1e-4


def test_table_has_one_row_per_compared_run(losses):
    lines = training.table(losses).splitlines()
    assert len(lines) == 2 + len(losses) - 1
    assert lines[0].split("|")[-2].strip() == "3"


def test_parameters_are_perturbed_by_at_most_two_ulps():
    params = {"kernel": np.float32(np.random.default_rng(0).normal(size=(50, 20)))}
    moved = jax.device_get(training.moved(params))["kernel"]
    steps = np.abs(moved - params["kernel"]) / np.spacing(np.abs(params["kernel"]))
    assert steps.max() <= 2 and (steps > 0).all()
