import json
import os
import sys

import pytest

from experiments.records import metrics
from experiments.runtime.progress import Output


def test_reporter_logs_and_records_metrics(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "SECONDS_LOGGED", 0)
    with metrics.Reporter(tmp_path, "title", "data", 0, 10) as reporter:
        reporter.write({"update": 4, "split": "train", "statistics": "batch"}, {"loss": 0.5})
        row = {"update": 5, "split": "valid", "statistics": "batch", "reading": "segments of 9"}
        reporter.write(row, {"loss": 0.25})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("update      4  data train (batch statistics)  loss 0.5000  ")
    assert lines[0].endswith(" left")
    assert lines[1] == "update      5  data valid (batch statistics, segments of 9)  loss 0.2500"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == row | {"loss": 0.25} and len(rows) == 2


@pytest.mark.parametrize("open_pair", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_reporter_shows_nothing_on_a_closed_output(monkeypatch, tmp_path, open_pair):
    reader, writer = open_pair()
    os.close(reader)  # as Ctrl-C closes `| tee log`
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", Output(closed))
        with metrics.Reporter(tmp_path, "title", "data", 0, 10) as reporter:
            for update in (1, 2):
                reporter.print("lost")
                row = {"update": update, "split": "train", "statistics": "batch"}
                reporter.write(row, {"loss": 0.5})
        print("lost, too", flush=True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_speed_counts_updates_since_timing_started(monkeypatch, tmp_path):
    with metrics.Reporter(tmp_path, "title", "data", 0, 100) as reporter:
        assert reporter.speed() == {}
        clock = iter([50, 0, 54])
        monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
        reporter.start_timing(10)
        reporter.advance(12)
        assert reporter.speed() == {"updates_per_second": 0.5}
        monkeypatch.undo()


def test_processes_other_than_the_first_write_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(metrics.processes, "is_first", lambda: False)
    with metrics.Reporter(tmp_path, "title", "data", 0, 10) as reporter:
        reporter.print("a line")
        reporter.write({"update": 4, "split": "valid", "statistics": "batch"}, {"loss": 0.5})
        reporter.sync()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []
