"""Jobs of several processes that run the same command, as a user starts them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments.records import checkpoints, metrics
from experiments.runtime import processes
from experiments.runtime.errors import UserError

ROOT = Path(__file__).parents[3]
TIMEOUT = 10  # seconds after which a silent process counts as lost

COMMAND = (
    "--config=configs/text.py",
    "--config.split=4000,1000,1000",
    "--config.segment_length=20",
    "--config.batch_size=32",
    "--config.model.kind=bn_lstm",
    "--config.model.features=12",
    "--config.num_updates=20",
    "--config.eval_every=10",
    "--config.checkpoint_every=5",
    "--config.log_every=5",
    "--config.population_batch_size=64",
    "--config.parallel.devices=0",
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("one, two."), 6000)))
    return f"--config.text_file={path}"


STARTED = []  # all processes, to be killed if a test fails


@pytest.fixture(autouse=True)
def kill_started_processes():
    yield
    while STARTED:
        STARTED.pop().kill()


class Job:
    """Processes that train together, with a number of virtual devices, or one for each."""

    def __init__(self, number_of, devices, folder, *arguments, own=(), timeout=60):
        self.folder, address = folder, f"127.0.0.1:{free_port()}"
        joining = [f"--coordinator_address={address}", f"--num_processes={number_of}"]
        joining = joining if number_of > 1 else []
        self.members = []
        devices = devices if isinstance(devices, tuple) else (devices,) * number_of
        for number in range(number_of):
            command = [sys.executable, "-m", "experiments.main", *COMMAND, *arguments, *joining]
            command += [f"--process_id={number}", f"--peer_timeout={timeout}"] if joining else []
            command += own[number] if own else []
            # Other processes get other workdirs, to test that only the first process writes.
            command.append(f"--workdir={folder if number == 0 else f'{folder}_{number}'}")
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices[number]),
                "PYTHONUNBUFFERED": "1",
                # Many clusters set a proxy. Nothing listens at this one.
                "http_proxy": "http://127.0.0.1:9",
                "https_proxy": "http://127.0.0.1:9",
            }
            self.members.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            STARTED.append(self.members[-1])

    def end(self, seconds=240):
        """Exit status and output of each."""
        outputs = []
        try:
            for member in self.members:
                outputs.append(member.communicate(timeout=seconds)[0])
        finally:
            for member in self.members:
                member.kill()
        return [(m.returncode, output) for m, output in zip(self.members, outputs, strict=True)]

    def wait_for_checkpoint(self, seconds=180):
        deadline = time.monotonic() + seconds
        saved = self.folder / "checkpoints"
        while not (saved.is_dir() and checkpoints.steps_in(saved)):
            assert time.monotonic() < deadline
            assert all(member.poll() is None for member in self.members), self.end()
            time.sleep(0.1)


def assert_finished(ended):
    assert [status for status, _ in ended] == [0] * len(ended), "\n".join(o for _, o in ended)


def assert_equal(ours, theirs, atol=1e-5):
    """Compares checkpoints, metrics and results; measured differences are 2e-7."""
    a, b = (
        flatten_dict(checkpoints.read_checkpoint(run / "checkpoints", 20), sep="/")
        for run in (ours, theirs)
    )
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=0, err_msg=name)
    for one, other in zip(*map(metrics.read_metrics, (ours, theirs)), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    one, other = (json.loads((run / "results.json").read_text()) for run in (ours, theirs))
    for row, expected in zip(one["rows"], other["rows"], strict=True):
        # Rounding may change the argmax where two characters are equally likely.
        assert row == pytest.approx(expected, abs=5e-3)


@pytest.fixture(scope="module")
def alone(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert_finished(Job(1, 1, folder, book).end())
    return folder


def test_two_processes_with_four_devices_match_one_device(book, alone, tmp_path):
    ended = Job(2, 4, tmp_path / "run", book).end()
    assert_finished(ended)
    assert "8 x cpu, in 2 processes" in ended[0][1]
    assert "| BN-LSTM " in ended[0][1] and "BN-LSTM" not in ended[1][1]  # only the first prints
    assert_equal(tmp_path / "run", alone)
    assert not (tmp_path / "run_1").exists()


@pytest.mark.long
@pytest.mark.parametrize("processes, devices", [(1, 8), (8, 1)])
def test_other_process_counts_match_one_device(book, alone, tmp_path, processes, devices):
    assert_finished(Job(processes, devices, tmp_path / "run", book).end(600))
    assert_equal(tmp_path / "run", alone)


@pytest.mark.long
def test_job_resumes_on_other_devices_after_losing_a_process(book, alone, tmp_path):
    """Killed on two processes, resumed on one device up to update 10, finished on two processes."""
    folder = tmp_path / "run"
    job = Job(2, 2, folder, book, "--config.num_updates=100000", timeout=TIMEOUT)
    job.wait_for_checkpoint()
    job.members[1].kill()
    assert job.end(6 * TIMEOUT)[0][0] != 0

    # The comparison is of 20 updates: remove later checkpoints.
    for step in checkpoints.steps_in(folder / "checkpoints"):
        if step > 5:
            path = folder / "checkpoints" / str(step)
            path.rename(tmp_path / path.name)
    (folder / "results.json").unlink(missing_ok=True)
    if not checkpoints.steps_in(folder / "checkpoints"):
        pytest.skip("this machine was too fast to be killed after five updates")
    stopped = Job(1, 1, folder, book, "--config.num_updates=10")
    assert_finished(stopped.end())
    assert_finished(Job(2, 2, folder, book).end())
    assert_equal(folder, alone)


@pytest.mark.parametrize("lost", [0, 1])
def test_other_processes_exit_when_one_is_killed(book, tmp_path, lost):
    job = Job(2, 1, tmp_path / "run", book, "--config.num_updates=100000", timeout=TIMEOUT)
    job.wait_for_checkpoint()
    job.members[lost].kill()
    assert job.end(6 * TIMEOUT)[1 - lost][0] != 0


def test_sigterm_to_one_stops_all_at_the_same_update(book, tmp_path):
    endless = ["--config.num_updates=100000", "--config.updates_per_call=5"]
    job = Job(2, 1, tmp_path / "run", book, *endless)
    job.wait_for_checkpoint()
    job.members[1].send_signal(signal.SIGTERM)
    ended = job.end()
    assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 2
    said = [re.search(r"stopped after update ([\d,]+) of", output)[1] for _, output in ended]
    assert said[0] == said[1]
    saved = checkpoints.steps_in(tmp_path / "run" / "checkpoints")
    assert f"{saved[0]:,}" == said[0]


def test_sigterm_during_the_final_evaluation_stops_all_processes(book, tmp_path):
    slow = ["--config.num_updates=5", "--config.eval_batch_size=2", "--config.chunk_length=2"]
    job = Job(2, 1, tmp_path / "run", book, *slow)
    job.wait_for_checkpoint()
    job.members[1].send_signal(signal.SIGTERM)
    ended = job.end()
    assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert all("stopped by SIGTERM" in said for _, said in ended)
    assert not (tmp_path / "run" / "results.json").exists()


def test_different_flags_or_data_raise_on_all_processes(book, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("".join(np.random.default_rng(1).choice(list("one, two."), 6000)))
    for own, difference in (
        (["--config.seed=2"], "error: config.seed is 2 in process 1, 1 in process 0"),
        ([f"--config.text_file={other}"], "error: data: dataset is other.txt"),
    ):
        ended = Job(2, 1, tmp_path / "run", book, own=([], own)).end()
        assert [status for status, _ in ended] == [2, 2], ended
        assert "error: another process differs from process 0" in ended[0][1]
        assert difference in ended[1][1]
        assert not (tmp_path / "run").exists()


def test_different_numbers_of_devices_raise_on_all_processes(book, tmp_path):
    ended = Job(2, (1, 3), tmp_path / "run", book).end()
    assert [status for status, _ in ended] == [2, 2], ended
    for _, said in ended:
        assert "error: process 1 has 3 devices, process 0 has 1: start" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("number", [0, 1])
def test_user_error_in_one_process_stops_all(book, tmp_path, number):
    own = [[], []]
    own[number] = ["--config.text_file=/nowhere/book.txt"]
    ended = Job(2, 1, tmp_path / "run", book, own=own, timeout=TIMEOUT).end()
    status, said = ended[number]
    assert status == 2 and said.splitlines()[-1].startswith("error: ") and "/nowhere" in said
    assert ended[1 - number][0] != 0


@pytest.mark.parametrize(
    "address, number, own, message",
    [
        ("127.0.0.1:1", None, 1, "--num_processes"),
        (None, 2, 1, "--coordinator_address=HOST:PORT"),
        ("127.0.0.1:1", 2, 2, "--process_id is 2"),
        ("nowhere", 2, 1, "--coordinator_address is 'nowhere'"),
        ("no.such.host.invalid:1", 2, 1, "--coordinator_address is 'no.such.host.invalid:1'"),
    ],
)
def test_invalid_distributed_flags_raise(address, number, own, message):
    with pytest.raises(UserError, match=message), processes.joined(address, number, own, 2):
        pass


def test_distributed_without_a_cluster_gives_a_one_line_error(book, tmp_path):
    hidden = ("SLURM", "OMPI", "TPU", "CLOUD", "KUBERNETES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    command = [sys.executable, "-m", "experiments.main", *COMMAND, book, "--distributed"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--distributed" in errors[0]
    assert not (tmp_path / "run").exists()
