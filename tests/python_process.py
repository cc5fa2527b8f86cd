"""Python programs in processes of their own."""

import subprocess
import sys
import textwrap
from pathlib import Path


def start(program, **environment):
    """Starts a Python process that runs a program with few environment variables."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[1],
        env={"JAX_PLATFORMS": "cpu", **{k: str(v) for k, v in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return output.strip(), log
