"""Runs that are killed at random moments; test_resume.py kills at chosen ones."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.finished_runs import differences

ROOT = Path(__file__).parents[2]
KILLS = 10  # in all
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SHORT = (
    "--config.num_updates=12",
    "--config.log_every=3",
    "--config.eval_every=6",
    "--config.checkpoint_every=2",
    "--config.model.features=6",
)


@pytest.fixture(params=["images", "text", "questions"])
def arguments(request, tmp_path):
    """The command line of a run of each task, without its workdir."""
    if request.param == "images":
        data_dir = request.getfixturevalue("prepared_dir")
        own = ["--config=configs/digits.py", "--config.model.kind=bn_lstm"]
        return [*own, f"--config.data_dir={data_dir}", *SHORT]
    if request.param == "questions":
        data_dir = request.getfixturevalue("data_dir")
        own = ["--config=configs/babi.py", "--config.model.kind=bn_e_star"]
        return [*own, f"--config.data_dir={data_dir}", *SHORT]
    book = tmp_path / "book.txt"
    book.write_text("".join(np.random.default_rng(0).choice(list("one, two."), 6000)))
    own = ["--config=configs/text.py", "--config.model.kind=bn_lstm", "--config.batch_size=32"]
    own += ["--config.split=4000,1000,1000", "--config.segment_length=20"]
    return [*own, f"--config.text_file={book}", *SHORT]


def start(arguments, folder):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.main", *arguments, f"--workdir={folder}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(arguments, folder, seconds, rng):
    """Starts a run and kills it at a random moment within `seconds`; False if it finished first."""
    process = start(arguments, folder)
    try:
        assert process.wait(rng.uniform(0, seconds)) == 0
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(rng.choice(SIGNALS))
        process.wait()
        return True


@pytest.mark.long
def test_runs_killed_at_random_times_match_an_uninterrupted_run(arguments, tmp_path):
    assert start(arguments, tmp_path / "first").wait() == 0  # prepares data, fills caches
    began = time.monotonic()
    assert start(arguments, tmp_path / "unbroken").wait() == 0
    seconds = 0.7 * (time.monotonic() - began)
    rng, kills = random.Random(0), 0
    for number in itertools.count():
        folder = tmp_path / f"killed_{number}"
        while kills < KILLS and kill(arguments, folder, seconds, rng):
            kills += 1
        assert start(arguments, folder).wait() == 0
        assert list(differences(folder, tmp_path / "unbroken")) == []
        if kills == KILLS:
            break
