import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import digits
from experiments import train
from tests.scripts import text_config


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder with finished runs of both kinds of model on one text; tests only read it."""
    folder = tmp_path_factory.mktemp("commands")
    for kind in ("lstm", "bn_lstm"):
        train.train(text_config(folder, kind), folder / "runs" / kind)
    return folder / "runs"


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> tuple[Path, ConfigDict, dict[str, Any]]:
    """A finished BN-LSTM on digits: its folder, config and results. Tests only read it."""
    folder = tmp_path_factory.mktemp("digits")
    config = digits.get_config()
    config.data_dir = str(folder)
    config.num_updates = config.eval_every = 2
    config.model.kind = "bn_lstm"
    config.model.features = 4
    return folder / "run", config, train.train(config, folder / "run")


@pytest.fixture
def finished(runs, tmp_path) -> Path:
    """A copy of the BN-LSTM's run on text, which a test may change."""
    return Path(shutil.copytree(runs / "bn_lstm", tmp_path / "run"))


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Runs a command in this process with these flag values; returns its stdout and stderr."""

    def call_main(command, *arguments, **values):
        monkeypatch.setattr(command.flags, "FLAGS", SimpleNamespace(**values))
        command.main([command.__name__, *arguments])
        return capsys.readouterr()

    return call_main
