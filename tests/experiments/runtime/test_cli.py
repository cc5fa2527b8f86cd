"""The behaviour that all commands share."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(program, *arguments, **environment):
    """Exit status, output and errors of a command with this code."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stdout, result.stderr


def test_unencodable_characters_are_replaced():
    program = """
        from experiments.runtime import (cli)
        cli.run(lambda _: print("mean \\xb1 deviation"))
    """
    assert run(program, PYTHONIOENCODING="ascii") == (0, "mean ? deviation\n", "")


def test_missing_jax_platform_gives_an_error_without_traceback():
    program = """
        import jax
        from experiments.runtime import (cli)
        cli.run(lambda _: print(jax.devices()))
    """
    status, _, errors = run(program, JAX_PLATFORMS="cuda")
    assert status == 2
    assert errors.splitlines()[-1].startswith("error: JAX_PLATFORMS=cuda: JAX finds no such device")
    assert "Traceback" not in errors


def test_unwritable_file_gives_a_one_line_error(tmp_path):
    program = """
        import pathlib, sys
        from absl import flags
        from experiments.runtime import (cli, files)
        cli.run(lambda argv: files.write_text(pathlib.Path(argv[1]), "text"), None, flags.FLAGS)
    """
    path = tmp_path / "missing" / "file"
    answer = run(program, str(path))
    assert answer == (2, "", f"error: {path}: No such file or directory\n")


def test_flags_are_read_from_nested_flagfiles(tmp_path):
    (tmp_path / "inner").write_text("--mode=evaluate\n")
    (tmp_path / "outer").write_text(f"# of a test\n--flagfile={tmp_path}/inner\n--workdir=none\n")
    program = """
        from experiments.runtime import (cli)
        from experiments import (main)
        cli.run(main.main, main.define_flags, main.parse_flags)
    """
    status, _, errors = run(program, "--workdir=other", f"--flagfile={tmp_path}/outer")
    assert (status, errors) == (
        2,
        "error: --workdir=none is not the folder of a run: none/config.json is missing\n",
    )


@pytest.mark.parametrize("command", ["experiments.main", "scripts.report"])
def test_arguments_that_are_no_flags_raise(command, tmp_path):
    words = [sys.executable, "-m", command, "configs/pmnist.py", f"--workdir={tmp_path / 'run'}"]
    if command == "scripts.report":
        words.pop()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    message = "error: unexpected argument 'configs/pmnist.py': write flags as --NAME=VALUE"
    assert done.returncode == 2 and done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_unexpected_errors_keep_their_traceback():
    program = """
        from experiments.runtime import (cli)
        cli.run(lambda _: [].pop())
    """
    status, _, errors = run(program, JAX_PLATFORMS="cpu")
    assert status == 1
    assert "IndexError: pop from empty list" in errors and "Traceback" in errors


@pytest.mark.parametrize("command", ["experiments.main", "scripts.sample"])
def test_ctrl_c_during_imports_shows_no_traceback(command, tmp_path):
    process = subprocess.Popen(
        # Tests in the background may ignore SIGINT, and their child processes inherit that.
        ["env", "--default-signal=INT", *(sys.executable, "-m", command, f"--workdir={tmp_path}")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while "libjax" not in maps.read_text() and "jaxlib" not in maps.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "stopped\n")
