"""Every command answers `--help`, without other arguments."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    f"{path.parent.name}.{path.stem}": path.read_text()
    for path in (ROOT / "experiments" / "main.py", *sorted((ROOT / "scripts").glob("*.py")))
}
COMMANDS = [name for name, source in SOURCES.items() if "__main__" in source]
FROM_OTHER_MODULES = {
    "scripts.slurm": ("config", "workdir", "time", "dry_run"),
    "scripts.sweep": ("config", "launcher", "jobs", "time"),
    "scripts.reproduce": ("launcher", "jobs", "time"),
}

# Imports slow packages once, then forks for each command.
PROGRAM = """
import os, runpy, sys
import flax.linen, jax, optax, orbax.checkpoint
import experiments.train

folder, *commands = sys.argv[1:]
for name in commands:
    if not (child := os.fork()):
        for stream, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{name}.{suffix}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = [name, "--help"]
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)
        os._exit(99)
    _, status = os.waitpid(child, 0)
    with open(f"{folder}/{name}.status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(status)))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit status, output and errors of each command."""
    folder = tmp_path_factory.mktemp("help")
    subprocess.run([sys.executable, "-c", PROGRAM, folder, *COMMANDS], cwd=ROOT, check=True)
    return {
        name: [(folder / f"{name}.{part}").read_text() for part in ("status", "out", "err")]
        for name in COMMANDS
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_every_flag(name, answers):
    status, output, errors = answers[name]
    assert (status, errors) == ("0", "")
    assert f"python -m {name}" in output
    own = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', SOURCES[name])
    for flag in (*own, *FROM_OTHER_MODULES.get(name, ())):
        assert re.search(rf"^  (-\w,)?--(\[no\])?{flag}: ", output, re.M), flag
