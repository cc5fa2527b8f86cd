"""The command, on each task; tests/experiments/test_resume.py kills at chosen moments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SHORT = (
    "--config.num_updates=12",
    "--config.log_every=3",
    "--config.eval_every=6",
    "--config.checkpoint_every=2",
    "--config.model.features=6",
)


@pytest.mark.long
@pytest.mark.parametrize("task", ["images", "text", "questions"])
def test_three_kills_lose_nothing(task, prepared_data, request, tmp_path):
    if task == "images":
        own = ["--config=configs/digits.py", f"--config.data_dir={prepared_data}"]
    elif task == "text":
        book = tmp_path / "book.txt"
        book.write_text("".join(np.random.default_rng(0).choice(list("one, two."), 6000)))
        own = ["--config=configs/text.py", f"--config.text_file={book}"]
        own += ["--config.split=4000,1000,1000", "--config.segment_length=20"]
        own += ["--config.batch_size=32"]
    else:
        data_dir = request.getfixturevalue("data_dir")
        own = ["--config=configs/babi.py", f"--config.data_dir={data_dir}"]
        own += ["--config.model.kind=bn_e_star"]
    outcome = tmp_path / "outcome.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.crash_test", *own, *SHORT),
            *("--kills=3", "--kills_per_run=3", f"--output={outcome}"),
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(outcome.read_text())
    assert (found["survived"], found["lost"]) == (3, 0)
    assert sum(found["moments"].values()) == 3


@pytest.fixture(scope="module")
def prepared_data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")
