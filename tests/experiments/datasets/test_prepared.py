import errno
import fcntl
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import digits, load, prepared
from experiments.records import workdir
from experiments.runtime import files
from experiments.runtime.errors import UserError

REPOSITORY = Path(__file__).parents[3]


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def command(*arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "scripts.prepare_data", *arguments]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.fixture(scope="module")
def digits_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    load("digits", str(folder))
    return folder


@pytest.fixture
def prepared_digits(digits_once, tmp_path):
    """The folder of freshly prepared digits; its data_dir is `tmp_path`."""
    return Path(shutil.copytree(digits_once / "prepared", tmp_path / "prepared") / "digits")


@pytest.fixture
def never_prepared(monkeypatch):
    def prepare(source_dir, work_dir):
        raise AssertionError("prepared again")

    monkeypatch.setattr(digits, "prepare", prepare)


def load_error(data_dir: Path, name: str = "digits") -> str:
    with pytest.raises(UserError) as caught:
        load(name, str(data_dir))
    message = str(caught.value)
    assert "\n" not in message
    return message


def forbid(monkeypatch, forbidden: Path) -> None:
    """Makes opening a file fail. Changed permissions would not stop root."""
    open_any = Path.open

    def open_if_allowed(path, *args, **kwargs):
        if path == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_any(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_if_allowed)


def assert_same(first, second):
    assert (first.name, first.info, first.digest) == (second.name, second.info, second.digest)
    assert first.arrays.keys() == second.arrays.keys()
    for name, array in first.arrays.items():
        assert array.dtype == second.arrays[name].dtype
        np.testing.assert_array_equal(array, second.arrays[name])


def test_second_load_reuses_the_prepared_data(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="absl")
    first = load("digits", str(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        f"Prepared digits in {tmp_path / 'prepared' / 'digits'}"
    ]
    monkeypatch.setattr(digits, "prepare", None)
    second = load("digits", str(tmp_path))
    assert_same(first, second)
    assert len(caplog.records) == 1
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["digits"]


def test_manifest_describes_every_file(prepared_digits):
    manifest = json.loads((prepared_digits / "manifest.json").read_text())
    on_disk = {path.name for path in prepared_digits.glob("*.npy")}
    assert set(manifest["files"]) == on_disk == {f"{name}.npy" for name in manifest["arrays"]}
    assert len(on_disk) == 6
    for name, file in manifest["files"].items():
        data = (prepared_digits / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        array = np.load(prepared_digits / name)
        assert manifest["arrays"][name.removesuffix(".npy")] == {
            "shape": list(array.shape),
            "dtype": array.dtype.str,
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
    assert manifest["versions"]["numpy"] == np.__version__
    assert "scikit-learn" in manifest["versions"]


@pytest.mark.parametrize("change", ["value", "dtype", "shape", "info"])
def test_digest_depends_on_arrays_and_info(tmp_path, monkeypatch, change):
    array, info = np.zeros((2, 3), np.uint8), {"num_classes": 10}
    changed, changed_info = {
        "value": (np.eye(2, 3, dtype=np.uint8), info),
        "dtype": (array.view(np.int8), info),
        "shape": (array.reshape(3, 2), info),
        "info": (array, {"num_classes": 9}),
    }[change]
    monkeypatch.setattr(digits, "prepare", lambda source_dir, work_dir: ({"x": array}, info, {}))
    first = load("digits", str(tmp_path / "first")).digest
    again = load("digits", str(tmp_path / "again")).digest
    monkeypatch.setattr(
        digits, "prepare", lambda source_dir, work_dir: ({"x": changed}, changed_info, {})
    )
    other = load("digits", str(tmp_path / "other")).digest
    assert first == again != other


@pytest.mark.parametrize("name", ["digit", "prepared", "../digits"])
def test_unknown_name_error_lists_names_and_suggests_the_closest(tmp_path, name):
    message = load_error(tmp_path, name)
    assert repr(name) in message and ", ".join(prepared.NAMES) in message
    assert ("did you mean digits?" in message) == (name != "prepared")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("flipped", "is damaged: SHA-256 "),
        ("truncated", "is damaged: 16127 bytes instead of 16128"),
        ("removed", "is missing"),
    ],
)
def test_damaged_array_is_reported(prepared_digits, tmp_path, never_prepared, damage, problem):
    path = prepared_digits / "valid_images.npy"
    data = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    message = load_error(tmp_path)
    assert message.startswith(f"{path} {problem}")
    assert f"delete the folder {prepared_digits} and run" in message
    assert f"python -m scripts.prepare_data digits --data_dir={tmp_path}" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "is missing"),
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"format": 0}', "has format 0"),
    ],
)
def test_unusable_manifest_is_reported(prepared_digits, tmp_path, never_prepared, text, problem):
    path = prepared_digits / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    assert load_error(tmp_path).startswith(f"{path} {problem}")


@pytest.mark.parametrize("name", ["manifest.json", "train_images.npy"])
def test_unreadable_prepared_file_is_reported(
    prepared_digits, tmp_path, never_prepared, monkeypatch, name
):
    forbid(monkeypatch, prepared_digits / name)
    message = load_error(tmp_path)
    assert message.startswith(f"{prepared_digits} cannot be read: ")
    assert message.endswith(f"Permission denied: '{prepared_digits / name}'")


def test_unreadable_original_file_is_reported(tmp_path, monkeypatch):
    path = tmp_path / "ptb" / "ptb.test.txt"
    path.parent.mkdir()
    path.touch()
    forbid(monkeypatch, path)
    message = load_error(tmp_path, "ptb")
    assert message.startswith(f"ptb cannot be prepared from {tmp_path}: ")
    assert message.endswith(f"Permission denied: '{path}'")  # another folder would not help
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


@pytest.mark.parametrize("name", ["babi", "cnn", "text8"])
def test_unreadable_folder_is_reported(tmp_path, monkeypatch, name):
    listdir = os.listdir

    def refuse(path):
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    message = load_error(tmp_path, name)
    assert message.startswith(f"{name} cannot be prepared from {tmp_path}: ")
    assert f"Permission denied: '{tmp_path}'" in message


def test_data_dir_of_unknown_user_raises(tmp_path):
    message = load_error("~nobody-of-this-name/data")
    assert message == "data_dir=~nobody-of-this-name/data: there is no user 'nobody-of-this-name'"


@pytest.mark.parametrize("part", ["info", "arrays", "files"])
def test_changed_manifest_is_reported(prepared_digits, tmp_path, never_prepared, part):
    path = prepared_digits / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[part].popitem()
    path.write_text(json.dumps(manifest))
    assert load_error(tmp_path).startswith(f"{path} is damaged")


def test_load_recovers_from_a_killed_preparation(tmp_path):
    killed = python(
        """
        import os, sys
        import numpy as np
        from experiments.datasets import (load)

        save = np.save
        def save_half(path, array, **kwargs):
            save(path, array[: len(array) // 2], **kwargs)
            os._exit(9)
        np.save = save_half
        load("digits", sys.argv[1])
        """,
        tmp_path,
    )
    assert killed.returncode == 9, killed.stderr
    left = sorted(path.name for path in (tmp_path / "prepared").iterdir())
    assert len(left) == 2 and all(name.startswith(".digits-") for name in left)
    assert load("digits", str(tmp_path)).arrays["train_images"].shape == (1297, 64)
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["digits"]


def test_interrupted_preparation_leaves_no_files(tmp_path, monkeypatch):
    def interrupt(source_dir, work_dir):
        (work_dir / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "prepare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("digits", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_second_process_waits_for_the_first(tmp_path, monkeypatch, caplog):
    prepare = digits.prepare
    prepared_by, others = [], []
    # The lock of a file treats another thread like another process.
    other = threading.Thread(target=lambda: others.append(load("digits", str(tmp_path))))

    def slow_prepare(source_dir, work_dir):
        prepared_by.append(threading.current_thread())
        other.start()
        deadline = time.monotonic() + 20
        while "waiting for it" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        return prepare(source_dir, work_dir)

    monkeypatch.setattr(digits, "prepare", slow_prepare)
    mine = load("digits", str(tmp_path))
    other.join(timeout=20)
    assert prepared_by == [threading.main_thread()]
    assert_same(mine, others[0])
    assert (
        "Another process prepares data in" in caplog.text and "cannot be written" not in caplog.text
    )
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["digits"]


@pytest.mark.parametrize("number, told", [(errno.EBADF, False), (errno.ENOLCK, True)])
def test_limited_file_locking_is_supported(tmp_path, monkeypatch, caplog, number, told):
    """NFS locks only what is open for writing (EBADF); some file systems lock nothing (ENOLCK)."""
    flock = files.fcntl.flock

    def limited(file, operation):
        is_read_only = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if number == errno.ENOLCK or is_read_only:
            raise OSError(number, os.strerror(number))
        return flock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", limited)
    load("digits", str(tmp_path / "data"))
    with workdir.in_use(tmp_path / "run"):
        assert (tmp_path / "run/lock").read_text().startswith(f"process {os.getpid()} ")
    assert ("is on a file system without locks" in caplog.text) == told


@pytest.mark.parametrize("parent", ["file", "/proc"])  # in /proc, mkdir says: not found
def test_unwritable_data_dir_is_reported(tmp_path, parent):
    (tmp_path / "file").touch()
    folder = tmp_path / parent / "data"
    message = load_error(folder)
    assert str(folder.parent) in message and "python -m scripts.prepare_data digits" in message


def test_command_prepares_and_verifies(tmp_path):
    folder = tmp_path / "prepared" / "digits"
    first = command("digits", f"--data_dir={tmp_path}")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("digits was prepared, verified")
    assert first.stderr == ""
    for path in folder.glob("*.npy"):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        assert any(str(path) in line and sha256 in line for line in first.stdout.splitlines())
    assert load("digits", str(tmp_path)).digest in first.stdout

    (folder / "test_labels.npy").unlink()
    second = command("digits", f"--data_dir={tmp_path}")
    assert second.returncode == 2 and second.stdout == ""
    assert second.stderr.startswith("error: ") and second.stderr.count("\n") == 1
    assert "test_labels.npy is missing" in second.stderr


def test_command_reports_a_missing_source(tmp_path):
    result = command("digits", f"--data_dir={tmp_path}", f"--source_dir={tmp_path / 'no'}")
    assert result.returncode == 2 and "--source_dir" in result.stderr
    assert result.stderr.count("\n") == 1


def test_names_match_the_modules_with_prepare():
    modules = [module.name for module in pkgutil.iter_modules(datasets.__path__)]
    offering = [
        name
        for name in modules
        if hasattr(importlib.import_module(f"experiments.datasets.{name}"), "prepare")
    ]
    assert sorted([*prepared.NAMES, "prepared"]) == offering
