import io
import os
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console

from experiments.runtime import progress


def test_log_lines_show_progress_and_remaining_time(capsys, monkeypatch):
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.track("abcdefg", "reading", 7)) == list("abcdefg")
    # A step takes 25 seconds by this clock, so there is a line after every third step.
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["reading: 3 of 7, 0:01:40 left", "reading: 6 of 7, 0:00:25 left"]


def test_progress_does_not_require_a_jax_device():
    code = "from experiments.runtime import progress; print(*progress.track([1, 2], 'reading', 2))"
    # The process would fail if JAX looked for a device.
    environment = os.environ | {"JAX_PLATFORMS": "absent"}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True) == "1 2\n"


@pytest.mark.parametrize(
    "output, status, said", [("Output(sys.stdout)", 0, "a b c\n"), ("sys.stdout", 1, "BrokenPipe")]
)
def test_closed_output_raises_unless_output_drops_text(output, status, said):
    code = f"""
        import sys
        from experiments.runtime import progress
        from experiments.runtime.progress import Output
        sys.stdout = {output}
        progress.SECONDS_LOGGED = -1  # a line for every item
        sys.stdin.read()
        print(*progress.track("abc", "reading", 3), file=sys.stderr)
    """
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    program = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(program, env=os.environ, text=True, **streams)
    process.stdout.close()
    process.stdin.close()
    error = process.stderr.read()
    assert (error == said if status == 0 else said in error) and process.wait() == status


@pytest.mark.parametrize("title", ["reading", "reading [red]" + 20 * " a very long name"])
def test_narrow_terminals_show_percentage_and_remaining_time(monkeypatch, title):
    terminal = Console(width=60, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda: terminal)
    assert list(progress.track("abcd", title, 4)) == list("abcd")
    last = terminal.file.getvalue().split("\r")[-2]
    assert " 100% " in last and " left reading" in last
    assert ("[red]" in last) == ("[red]" in title)
