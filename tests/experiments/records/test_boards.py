import json
import struct
import sys
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from experiments import config, train
from experiments.records import boards, metrics
from experiments.runtime.errors import UserError
from tests.full_disk import files_of_at_most


def read_events(folder):
    """Events of all files in a folder, oldest file first."""
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:  # records are: length, its checksum, event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def curves(folder):
    """The points of each curve, as TensorBoard shows them."""
    shown = {}
    for event in read_events(folder):
        if event.session_log.status == SessionLog.START:  # drops points of its step or later
            shown = {(tag, step): v for (tag, step), v in shown.items() if step < event.step}
        for value in event.summary.value:
            if not value.metadata.plugin_data.plugin_name:
                shown[value.tag, event.step] = value.simple_value
    tags = {tag for tag, _ in shown}
    return {tag: {step: v for (own, step), v in shown.items() if own == tag} for tag in tags}


def test_tensorboard_drops_points_after_the_resumed_checkpoint(small_config, tmp_path):
    for start, values, losses in (
        (0, [1.0, 2.0, 3.0], {1: 1.0, 2: 2.0, 3: 3.0}),
        (1, [5.0], {1: 1.0, 2: 5.0}),
        (1, [], {1: 1.0}),
    ):
        with (
            boards.opened(tmp_path, small_config, start) as shown,
            metrics.Reporter(tmp_path, "title", "data", start, 10, shown) as reporter,
        ):
            for update, value in enumerate(values, start + 1):
                row = {"update": update, "split": "train", "statistics": "batch"}
                reporter.write(row, {"loss": value}, {"learning_rate": 0.5})
            reporter.sync()
        shown = curves(tmp_path / "tensorboard")
        assert shown == {
            "train/loss": losses,
            "train/learning_rate": dict.fromkeys(losses, 0.5),
        }
        assert all("learning_rate" not in row for row in metrics.read_metrics(tmp_path))


def test_tensorboard_has_config_and_results(small_config, tmp_path):
    small_config.optimizer.learning_rate = 0.25
    results = train.train(small_config, tmp_path)
    shown = curves(tmp_path / "tensorboard")
    assert set(shown["train/gradient_norm"]) == set(shown["train/loss"]) == {3, 6, 8}
    assert shown["train/learning_rate"] == {3: 0.25, 6: 0.25, 8: 0.25}
    assert min(shown["train/updates_per_second"].values()) > 0
    accuracy = {
        row["statistics"]: row["accuracy"] for row in results["rows"] if row["split"] == "test"
    }
    for suffix, statistics in ("", "population"), ("_batch", "batch"), ("_running", "running"):
        (value,) = shown[f"final/test/accuracy{suffix}"].items()
        assert value == (results["update"], pytest.approx(accuracy[statistics]))

    assert [path.is_file() for path in (tmp_path / "tensorboard").iterdir()] == [True]
    plugin = [
        HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in read_events(tmp_path / "tensorboard")
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    ]
    fields = plugin[0].session_start_info.hparams
    assert fields["optimizer.learning_rate"].number_value == 0.25
    assert fields["model.kind"].string_value == "bn_lstm"
    assert fields["model.normalize"].string_value == '["input", "recurrent", "cell"]'
    assert plugin[1].WhichOneof("data") == "session_end_info"


def test_each_reading_has_its_own_final_scalar():
    row = {"split": "test", "statistics": "none", "accuracy": 0.5}
    rows = [row, row | {"reading": "segments of 100", "accuracy": 0.25}]
    assert boards.final_scalars(rows) == {
        "final/test/accuracy": 0.5,
        "final/test/segments_of_100/accuracy": 0.25,
    }


def test_full_disk_raises(small_config, tmp_path):
    """TensorBoard's file reaches the limit before the file of metrics does."""
    with (
        files_of_at_most(4000),
        pytest.raises(OSError, match="File too large"),
        boards.opened(tmp_path, small_config, 0) as shown,
        metrics.Reporter(tmp_path, "title", "data", 0, 10, shown) as reporter,
    ):
        row = {"update": 4, "split": "valid", "statistics": "batch"}
        reporter.write(row, {f"m{number}": 0.5 for number in range(100)})
    assert (tmp_path / "metrics.jsonl").stat().st_size < 3000


class StandIn:
    """Replaces the package wandb, and records its calls."""

    Error = RuntimeError
    Settings = SimpleNamespace

    def __init__(self):
        self.starts, self.logged, self.summary, self.ends = [], [], {}, []

    def init(self, **fields):
        self.starts.append(fields)
        return self

    def log(self, scalars, step):
        self.logged.append((step, sorted(scalars)))

    def finish(self, exit_code):
        self.ends.append(exit_code)


def test_resumed_run_continues_the_same_wandb_run(small_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", package := StandIn())
    small_config.num_updates = 4
    train.train(small_config, tmp_path)
    assert package.starts == []  # nobody asked for it

    small_config.wandb = "recurrent"
    for small_config.num_updates in (6, 8):
        results = train.train(small_config, tmp_path)
    first, second = package.starts
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["project"] == "recurrent" and first["config"]["model"]["kind"] == "bn_lstm"
    training = ["accuracy", "gradient_norm", "learning_rate", "loss"]
    assert [step for step, names in package.logged if "valid/loss" in names] == [6, 8]
    assert (6, [f"train/{name}" for name in training]) in [
        (step, [name for name in names if "per_second" not in name])
        for step, names in package.logged
    ]
    assert package.summary["final/update"] == results["update"]
    assert package.ends == [0, 0]

    small_config.wandb = "another"
    with pytest.raises(ZeroDivisionError), boards.opened(tmp_path, small_config):
        1 / 0  # noqa: B018
    assert package.starts[2]["id"] != first["id"] and package.ends[2] == 1
    assert json.loads((tmp_path / "wandb.json").read_text()).keys() == {"recurrent", "another"}


def test_wandb_logs_offline_and_invalid_project_raises(small_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    small_config.wandb = "recurrent"
    for update in 1, 2:
        with boards.opened(tmp_path, small_config) as shown:
            for board in shown:
                board.write({"train/loss": 0.5}, update)
                board.write_results({"final/test/accuracy": 0.25}, update)
    (own,) = json.loads((tmp_path / "wandb.json").read_text()).values()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{own}/run-{own}.wandb"))
    assert files and all(b"final/test/accuracy" in file.read_bytes() for file in files)

    small_config.wandb = "a/b"
    with (
        pytest.raises(UserError, match=r"config\.wandb is a/b"),
        boards.opened(tmp_path, small_config),
    ):
        pass


def test_missing_wandb_package_raises(small_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config.check(small_config)
    small_config.wandb = "recurrent"
    with pytest.raises(UserError, match="pip install wandb"):
        config.check(small_config)
