import contextlib
import json
import os

import pytest

from experiments.records import metrics


def test_training_tells_a_log_file_how_far_it_is(capsys, monkeypatch, tmp_path):
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


def test_a_run_does_not_need_to_be_heard(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)  # as of `| tee log`, upon Ctrl-C
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as closed:
        terminal = metrics.Terminal(file=closed)
        terminal.print("lost")
        assert terminal.quiet
        terminal.print("too")


def test_the_stopwatch_adds_up_what_blocks_take(monkeypatch):
    clock = iter([0, 1, 1, 4, 10, 12])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    doing = metrics.Stopwatch()
    with doing("input"):
        pass
    with pytest.raises(KeyError), doing("device"):
        raise KeyError
    with doing("input"):
        pass
    assert doing.seconds == {"input": 3, "device": 3}
    table = doing.table(updates=2)
    assert "| input             | 1500.000 | 50.00%  |" in table
    assert "| in all            | 3000.000 | 100.00% |" in table


def test_speed_is_of_the_updates_since_it_was_last_taken_without_compilation(monkeypatch):
    clock = iter([0, 50, 50, 52, 60, 64, 64, 80])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    doing = metrics.Stopwatch()
    with doing("compilation"):
        pass
    assert doing.updates_per_second(0) is None
    with doing("input"):
        pass
    assert doing.updates_per_second(10) == 5
    with doing("device"):
        pass
    with doing("compilation"):
        pass
    assert doing.updates_per_second(12) == 0.5
