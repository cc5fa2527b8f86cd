import contextlib
import io
import json
import os
import struct

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments import metrics
from tests.full_disk import files_of_at_most


def test_a_log_file_gets_lines_with_the_time_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    assert list(metrics.track("abcdefg", "reading", 7)) == list("abcdefg")
    # A step takes 25 seconds by this clock: a line after every third of them.
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["reading: 3 of 7, 0:01:40 left", "reading: 6 of 7, 0:00:25 left"]


@pytest.mark.parametrize("title", ["reading", "reading [red]" + 20 * " a very long name"])
def test_a_narrow_terminal_has_room_for_the_numbers(monkeypatch, title):
    terminal = Console(width=60, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr(metrics, "Console", lambda: terminal)
    assert list(metrics.track("abcd", title, 4)) == list("abcd")
    last = terminal.file.getvalue().split("\r")[-2]
    assert " 100% " in last and " left reading" in last
    assert ("[red]" in last) == ("[red]" in title)


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


def test_tensorboard_gets_every_number_and_drops_those_of_a_stopped_run(tmp_path):
    for start, values in (0, [1.0, 2.0, 3.0]), (1, [5.0]):
        with metrics.Reporter(tmp_path, "title", "data", start, 10) as reporter:
            for update, value in enumerate(values, start + 1):
                row = {"update": update, "split": "train", "statistics": "batch"}
                reporter.write(row, {"loss": value})
            reporter.sync()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_size)
    events = [event for path in reversed(files) for event in read_events(path)]
    # As TensorBoard has it: a start takes back what is of its step or later.
    shown = {}
    for event in events:
        if event.session_log.status == SessionLog.START:
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            shown[event.step] = value.tag, value.simple_value
    assert shown == {1: ("train/loss", 1.0), 2: ("train/loss", 5.0)}


def read_events(path):
    """Records are: length, its checksum, event, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_a_disk_that_fills_up_is_told(tmp_path):
    """TensorBoard's file meets the limit before that of the metrics does."""
    with (
        files_of_at_most(3000),
        pytest.raises(OSError, match="File too large"),
        metrics.Reporter(tmp_path, "title", "data", 0, 10) as reporter,
    ):
        row = {"update": 4, "split": "valid", "statistics": "batch"}
        reporter.write(row, {f"m{number}": 0.5 for number in range(100)})
    assert (tmp_path / "metrics.jsonl").stat().st_size < 3000


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
