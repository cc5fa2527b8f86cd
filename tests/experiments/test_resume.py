"""A run that was killed, stopped or damaged ends like an unbroken one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from experiments import train, train_step
from experiments.records import checkpoints, metrics, results_file, workdir
from experiments.runtime import finite
from experiments.runtime.errors import Stopped, UserError
from experiments.tasks import sequential_images
from tests.experiments.finished_runs import differences
from tests.full_disk import files_of_at_most

ROOT = Path(__file__).parents[2]
# The bits of a product depend on its number of threads, which depends on the number of devices.
ENVIRONMENT = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.config.jax_num_cpu_devices)}

# Runs a config in a process that kills itself at the Nth call of a function.
DEATH = """
import importlib, json, os, signal, sys
config, folder, place, name, times = json.loads(sys.argv[1])
from ml_collections import ConfigDict
from experiments import (train)
from experiments.records import (workdir)
from pathlib import Path
module, _, owner = place.partition(":")
module = importlib.import_module(module)
owner = getattr(module, owner) if owner else module
function, calls = getattr(owner, name), []
def deadly(*args, **kwargs):
    calls.append(None)
    if len(calls) == times:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)
setattr(owner, name, deadly)
train.train(ConfigDict(json.loads(config, object_hook=workdir._tuples)), Path(folder))
"""

# Where to die: module or module:class, function, and the number of its last call.
DEATHS = {
    "before it has written anything": ("experiments.records.workdir", "write_json", 1),
    "before the first checkpoint": ("experiments.tasks.sequential_images:Task", "train_batch", 4),
    "between a checkpoint's arrays and its name": (
        "orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath",
        "finalize",
        2,
    ),
    "past a checkpoint and rows after it": (
        "experiments.tasks.sequential_images:Task",
        "train_batch",
        5,
    ),
    "in validation": ("experiments.tasks.sequential_images:Task", "batches", 1),
    "between metrics and their checkpoint": (
        "experiments.records.checkpoints:Checkpoints",
        "save",
        1,
    ),
    "in the last evaluation": ("experiments.records.workdir", "write_statistics", 1),
}


@pytest.fixture(scope="module")
def noisy(base_config):
    """A config with noise, which a resumed run must draw in the same way."""
    config = base_config.copy_and_resolve_references()
    config.model.initial_hidden_noise = 0.1
    return config


@pytest.fixture
def config(noisy):
    """A copy of `noisy`, which a test may change."""
    return noisy.copy_and_resolve_references()


@pytest.fixture(scope="module")
def unbroken(noisy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    train.train(noisy, folder)
    return folder


def copy(run, folder):
    return Path(shutil.copytree(run, folder))


def test_repeatedly_killed_run_matches_an_uninterrupted_run(config, unbroken, tmp_path):
    folder = tmp_path / "run"
    for when, (place, name, times) in DEATHS.items():
        told = json.dumps([config.to_json_best_effort(), str(folder), place, name, times])
        done = subprocess.run(
            [sys.executable, "-c", DEATH, told],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, (when, done.stdout + done.stderr)
        if when == "in validation":  # the last row may also be incomplete
            with (folder / metrics.FILE_NAME).open("a") as file:
                file.write('{"update": 8, "split": "tra')
    assert not (folder / "results.json").exists()
    train.train(config, folder)
    assert list(differences(folder, unbroken)) == []
    assert not list((folder / "checkpoints").glob("*tmp*"))


def test_rerunning_a_finished_run_changes_nothing(config, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Evaluator, "evaluate_all", None)  # it is not even evaluated
    folder = copy(unbroken, tmp_path / "run")
    results = train.train(config, folder)
    assert results == json.loads((unbroken / "results.json").read_text())
    for name in ("run.json", "results.json", metrics.FILE_NAME):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
    assert list(differences(folder, unbroken)) == []


def test_comparison_of_runs_finds_differences(config, unbroken, tmp_path):
    config.seed = 2
    train.train(config, tmp_path)
    found = "\n".join(differences(tmp_path, unbroken))
    assert "metrics.jsonl differs" in found and "latest checkpoint/params" in found
    other = copy(unbroken, tmp_path / "twice")
    rows = (other / metrics.FILE_NAME).read_text().splitlines(keepends=True)
    (other / metrics.FILE_NAME).write_text("".join([*rows, rows[-1]]))
    assert "metrics.jsonl has a row twice" in list(differences(other, unbroken))


# ---- Signals.


def ends(folder):
    """The last update of each start; checks that each start has recorded its duration."""
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert all(start["seconds"] >= 0 for start in starts)
    return [start["until"] for start in starts]


def stop_at(monkeypatch, update, *signals):
    """Raises signals while the batch of an update is read."""
    unstopped = sequential_images.Task.train_batch

    def train_batch(task, now, *share):
        if now == update:
            for number in signals:
                signal.raise_signal(number)
        return unstopped(task, now, *share)

    monkeypatch.setattr(sequential_images.Task, "train_batch", train_batch)


@pytest.mark.parametrize("number, times", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_signal_saves_a_checkpoint_and_the_run_resumes(
    config, unbroken, tmp_path, monkeypatch, number, times
):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        stop_at(patch, 5, *[number] * times)
        message = f"{number.name}: stopped after update 6 of 8, which is saved; run the same"
        with pytest.raises(Stopped, match=message) as stopped:
            train.train(config, tmp_path)
    assert stopped.value.status == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert checkpoints.steps_in(tmp_path / "checkpoints")[0] == 6
    train.train(config, tmp_path)
    assert list(differences(tmp_path, unbroken)) == []
    assert ends(tmp_path) == [6, 8]


def test_second_ctrl_c_stops_at_once(config, tmp_path):
    script = DEATH.replace("os.kill(os.getpid(), signal.SIGKILL)", "stop()").replace(
        "def deadly",
        "def stop():\n    for _ in range(2): signal.raise_signal(signal.SIGINT)\ndef deadly",
    )
    place = ("experiments.tasks.sequential_images:Task", "train_batch", 7)  # update 5
    told = json.dumps([config.to_json_best_effort(), str(tmp_path / "run"), *place])
    done = subprocess.run(
        [sys.executable, "-c", script, told],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGINT
    assert "Ctrl-C: stopping after this update or batch; press Ctrl-C again to stop" in done.stderr
    assert 6 not in checkpoints.steps_in(tmp_path / "run" / "checkpoints")  # nothing was saved


def test_signal_in_the_last_save_skips_final_evaluation(config, unbroken, tmp_path, monkeypatch):
    """A signal while the last checkpoint is saved prevents the final evaluation, which is long."""
    with monkeypatch.context() as patch:
        save = checkpoints.Checkpoints.save

        def saving(self, state, validation):
            save(self, state, validation)
            if int(state.step) == 8:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(checkpoints.Checkpoints, "save", saving)
        patch.setattr(train, "evaluate_best", lambda *_: pytest.fail("went on"))
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            train.train(config, tmp_path)
    train.train(config, tmp_path)
    assert list(differences(tmp_path, unbroken)) == []


def test_failed_background_save_raises(config, tmp_path, monkeypatch):
    """When a run is stopped, saving continues in the background and may fail there."""
    stop_at(monkeypatch, 2, signal.SIGTERM)
    written = ocp.CheckpointManager.close

    def close(self):
        written(self)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "close", close)
    with pytest.raises(UserError, match=r"a checkpoint cannot be written .*no space left"):
        train.train(config, tmp_path)


def test_signal_during_the_final_evaluation_stops_it(config, unbroken, tmp_path, monkeypatch):
    unstopped = train.Evaluator.evaluate_all

    def evaluate_all(*arguments):
        signal.raise_signal(signal.SIGTERM)
        yield from unstopped(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.Evaluator, "evaluate_all", evaluate_all)
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            train.train(config, tmp_path)
    assert ends(tmp_path) == [8]
    train.train(config, tmp_path)
    assert list(differences(tmp_path, unbroken)) == []


def test_signal_at_the_very_end_stops_the_runs_that_follow(config, tmp_path, monkeypatch):
    written = results_file.write

    def write(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return written(*arguments)

    monkeypatch.setattr(results_file, "write", write)
    train.train(config, tmp_path / "last")
    with pytest.raises(Stopped, match="stopped by SIGTERM; run the same command to continue"):
        train.train(config, tmp_path / "first", more=True)
    assert ends(tmp_path / "first") == ends(tmp_path / "last") == [8]


# ---- Damage.


def files_of(checkpoint):
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def spoil_truncate(checkpoint):
    largest = max(files_of(checkpoint / "default"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def spoil_bit(checkpoint):
    largest = max(files_of(checkpoint / "default"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def spoil_metrics(checkpoint):
    path = checkpoint / "metrics" / "metrics"
    path.write_text(path.read_text().replace(": 0.", ": 9."))


def spoil_seal(checkpoint):
    (checkpoint / "_CHECKPOINT_METADATA").write_text("{")


@pytest.mark.parametrize("spoil", [spoil_truncate, spoil_bit, spoil_metrics, spoil_seal])
def test_reading_a_damaged_checkpoint_raises(unbroken, tmp_path, spoil):
    folder = copy(unbroken, tmp_path / "run") / "checkpoints"
    spoil(folder / "8")
    with pytest.raises(checkpoints.Damaged):
        checkpoints.read_checkpoint(folder, 8)


def test_damaged_checkpoint_is_renamed_and_the_previous_one_used(
    config, unbroken, tmp_path, caplog
):
    folder = copy(unbroken, tmp_path / "run")
    spoil_bit(folder / "checkpoints" / "8")
    train.train(config, folder)
    assert re.search(r"checkpoints/8 is damaged: .* it was renamed to .*8\.damaged", caplog.text)
    assert (folder / "checkpoints" / "8.damaged").is_dir()
    assert list(differences(folder, unbroken)) == []
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert len(starts) == 2
    train.train(config, folder)  # finished: no third start
    assert json.loads((folder / "run.json").read_text())["starts"] == starts


@pytest.mark.parametrize("damaged", [True, False])
def test_finished_run_is_evaluated_again_if_its_best_checkpoint_is_damaged(
    config, tmp_path, monkeypatch, damaged
):
    validated = train.Training.validate

    def validate(self, *arguments):
        best = {self.setup.task.selection: 1.0} if self.done == 4 else {}
        return validated(self, *arguments) | best

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "validate", validate)
        before = train.train(config, tmp_path)
    assert before["update"] == 4
    if damaged:
        spoil_seal(tmp_path / "checkpoints" / "4")
    else:  # deleted on purpose
        shutil.rmtree(tmp_path / "checkpoints" / "4")
    for _ in range(2):
        results = train.train(config, tmp_path)
        assert results["update"] == (8 if damaged else 4)
        assert json.loads((tmp_path / "results.json").read_text()) == results
    assert checkpoints.read_best(tmp_path)[0] == 8


@pytest.mark.parametrize("finished", [True, False])
def test_run_without_its_checkpoints_raises_and_stays_unchanged(
    config, unbroken, tmp_path, finished
):
    folder = copy(unbroken, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    if not finished:
        (folder / "results.json").unlink()
        with (folder / metrics.FILE_NAME).open("a") as file:
            file.write('{"update": 9, "split": "train"}\n')
    before = {path: path.read_bytes() for path in files_of(folder) if path.name != "lock"}
    message = rf"metrics up to update {8 if finished else 9}, but no checkpoint: restore"
    with pytest.raises(UserError, match=message):
        train.train(config, folder)
    assert {path: path.read_bytes() for path in before} == before
    assert not (folder / "checkpoints").exists()


def test_read_errors_do_not_rename_checkpoints(unbroken, tmp_path, monkeypatch):
    """A temporary failure of a disk or network, or a signal, does not put checkpoints aside."""
    folder = copy(unbroken, tmp_path / "run") / "checkpoints"
    before = files_of(folder)
    restore = ocp.Checkpointer.restore
    for problem, raised, message in (
        (OSError(5, "Input/output error"), UserError, "8 cannot be read: Input/output error"),
        (MemoryError(), MemoryError, None),
        (Stopped("", signal.SIGTERM), Stopped, None),
        # Errors as TensorStore raises them.
        (ValueError("[os_error_code='13']"), UserError, "8 cannot be read: Permission denied"),
        (ValueError("[os_error_code='2']"), UserError, "8 is damaged"),
        (ValueError(), UserError, "8 is damaged"),
    ):

        def fails(*_, problem=problem, **__):
            raise problem

        monkeypatch.setattr(ocp.Checkpointer, "restore", fails)
        with pytest.raises(raised, match=message):
            checkpoints.put_aside_damaged(folder)
        assert files_of(folder) == before
    monkeypatch.setattr(ocp.Checkpointer, "restore", restore)
    checkpoints.put_aside_damaged(folder)
    assert files_of(folder) == before


def test_flipped_bits_are_detected_or_harmless(unbroken, tmp_path):
    """At random places in every file of a checkpoint. Wrong values are never returned."""
    folder = copy(unbroken, tmp_path / "run") / "checkpoints"
    expected = checkpoints.read_checkpoint(folder, 8)
    rng, found = np.random.default_rng(0), 0
    for path in files_of(folder / "8"):
        content = path.read_bytes()
        for position in rng.integers(len(content), size=3 if content else 0):
            spoilt = bytearray(content)
            spoilt[position] ^= 1 << rng.integers(8)
            path.write_bytes(spoilt)
            try:
                arrays = checkpoints.read_checkpoint(folder, 8)
            except checkpoints.Damaged:
                found += 1
            else:
                jax.tree.map(np.testing.assert_array_equal, arrays, expected)
        path.write_bytes(content)
    assert found > 5
    checkpoints.read_checkpoint(folder, 8)


def test_run_with_only_damaged_checkpoints_raises(config, unbroken, tmp_path):
    folder = copy(unbroken, tmp_path / "run")
    for step in (4, 8):
        spoil_bit(folder / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"8 is damaged: .*, and no other is intact: start a new"):
        train.train(config, folder)
    assert checkpoints.steps_in(folder / "checkpoints") == [8, 4]  # kept for inspection
    with pytest.raises(UserError, match=r"is damaged"):
        checkpoints.read_best(folder)


def test_reading_a_replaced_checkpoint_is_retried(unbroken, monkeypatch):
    """The run may replace a checkpoint with a better one just before it is read."""
    read, calls = checkpoints.read_checkpoint, []

    def read_checkpoint(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise checkpoints.Damaged("deleted")
        return read(*arguments)

    monkeypatch.setattr(checkpoints, "read_checkpoint", read_checkpoint)
    assert checkpoints.read_best(unbroken)[2] == "population"
    assert len(calls) == 2


# ---- Places that cannot be written.


@pytest.mark.parametrize("size", [0, 2000])
def test_full_disk_gives_a_one_line_error(config, unbroken, tmp_path, monkeypatch, size):
    """At the start and from update 6 on. Earlier files stay, and the run continues from them."""
    half = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        with pytest.raises(Stopped):
            train.train(config, half)
    with files_of_at_most(size), pytest.raises(UserError) as stopped:
        train.train(config, half)
    message = str(stopped.value)
    assert "written" in message and "\n" not in message and len(message) < 500
    assert checkpoints.steps_in(half / "checkpoints")[0] == 5
    train.train(config, half)
    assert list(differences(half, unbroken)) == []


@pytest.mark.parametrize("name", ["[x]", "a]", "a\\b"])
def test_invalid_checkpoint_paths_raise(config, tmp_path, name):
    with pytest.raises(UserError, match="checkpoints cannot be read from a path with"):
        train.train(config, tmp_path / name / "run")
    assert not list(tmp_path.iterdir())


def test_file_as_workdir_raises(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        train.train(config, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be read or written: Not a directory"):
        train.train(config, tmp_path / "file" / "run")


def test_nested_workdirs_raise(config, unbroken, tmp_path):
    folder = copy(unbroken, tmp_path / "several" / "bn_lstm")
    for new in (folder.parent, folder / "lstm"):
        with pytest.raises(UserError, match=f"runs cannot be nested.* {folder};"):
            train.train(config, new)
        with pytest.raises(UserError, match=f"is not the folder of a run: choose {folder}$"):
            workdir.read_config(new)
    assert not (folder / "lstm").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["bn_lstm"]


def test_missing_data_leaves_the_run_unchanged(config, unbroken, tmp_path):
    folder = copy(unbroken, tmp_path / "run")
    config.num_updates = 10
    (tmp_path / "data" / "prepared" / "digits").mkdir(parents=True)
    config.data_dir = str(tmp_path / "data")
    with pytest.raises(UserError, match=r"prepared/digits/manifest\.json is missing"):
        train.train(config, folder)
    assert list(differences(folder, unbroken)) == []


def test_workdir_in_use_by_another_process_raises(config, unbroken, tmp_path):
    folder = copy(unbroken, tmp_path / "run")
    before = {path: path.read_bytes() for path in files_of(folder)}
    code = (
        "import sys, time; from pathlib import Path; from experiments.records import workdir\n"
        "with workdir.in_use(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"is in use by process {other.pid} on .*: wait for it"):
            train.train(config, folder)
        after = {path: path.read_bytes() for path in files_of(folder) if path.name != "lock"}
        assert after == {path: content for path, content in before.items() if path.name != "lock"}
    finally:
        other.kill()
        other.wait()
    train.train(config, folder)  # a killed run holds no lock


# ---- Non-finite values.


@pytest.mark.parametrize("at_once", [1, 3])
def test_non_finite_update_is_not_applied(config, tmp_path, monkeypatch, at_once):
    """The gradient becomes infinite in update 6, with a finite loss."""
    config.updates_per_call, config.log_every = at_once, 8
    sound = train_step.make_optimizer

    def spoilt(optimizer):
        rule = sound(optimizer)

        def update(gradients, state, params=None):
            gradients, rule_state = rule.update(gradients, state[1], params)
            kernel = gradients["layer"]["recurrent_kernel"]
            gradients["layer"]["recurrent_kernel"] = jax.numpy.where(state[0] == 5, np.inf, kernel)
            return gradients, (state[0] + 1, rule_state)

        return optax.GradientTransformation(lambda params: (0, rule.init(params)), update)

    monkeypatch.setattr(train_step, "make_optimizer", spoilt)
    message = "update 6 was not applied: the parameter layer/recurrent_kernel would not be finite; "
    with pytest.raises(UserError, match=f"{message}the latest checkpoint, of update 4, is in"):
        train.train(config, tmp_path)
    assert ends(tmp_path) == [5]  # found after update 8
    arrays = checkpoints.read_checkpoint(tmp_path / "checkpoints", 4)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(arrays))


def test_non_finite_values_are_named():
    params, statistics = {"a": {"kernel": np.ones(2)}}, {"a": {"mean": np.ones(3)}}
    gradients = {"a": {"kernel": np.array([1, np.nan])}}
    names = finite.names(params, statistics)
    flags = np.asarray(finite.not_finite(params, statistics, gradients, np.inf))
    assert finite.describe(names, flags) == "the loss would not be finite (and 1 more)"
    statistics["a"]["mean"][0] = np.inf
    flags = np.asarray(finite.not_finite(params, statistics, gradients, 1.0))
    assert finite.describe(names, flags).startswith("the statistic a/mean would not")
