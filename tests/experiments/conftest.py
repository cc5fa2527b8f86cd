from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import digits
from experiments import datasets


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory) -> Path:
    """A data_dir in which the digits are prepared."""
    folder = tmp_path_factory.mktemp("data")
    datasets.load("digits", str(folder))
    return folder


@pytest.fixture(scope="session")
def base_config(prepared_dir) -> ConfigDict:
    """The digits with a small BN-LSTM, for a few updates. Tests change `small_config` instead."""
    config = digits.get_config()
    config.data_dir = str(prepared_dir)
    config.batch_size = 500  # three batches an epoch, the last one short
    config.num_updates = 8
    config.model.kind = "bn_lstm"
    config.model.features = 6
    config.log_every = 3
    config.eval_every = 4
    config.checkpoint_every = 4
    return config


@pytest.fixture
def small_config(base_config) -> ConfigDict:
    """A copy of `base_config`, to be changed."""
    return base_config.copy_and_resolve_references()
