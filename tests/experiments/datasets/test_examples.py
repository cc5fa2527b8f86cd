import tempfile

import pytest
import tensorflow_datasets as tfds

from experiments.datasets import examples, prepared
from tests.full_disk import files_of_at_most

FEATURES = {"text": tfds.features.Text()}


def test_full_disk_raises_an_os_error():
    rows = ({"text": f"{n} {'x' * 1000}"} for n in range(3000))
    with files_of_at_most(1000), pytest.raises(OSError, match=r"File too large") as caught:
        examples.read(FEATURES, {"train": rows})
    assert "\n" not in str(caught.value)


def test_temporary_files_are_in_the_work_folder_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with prepared._work_dir(tmp_path / "prepared" / "name") as folder:
        (row,) = examples.read(FEATURES, {"train": [{"text": "a"}]})["train"]
        assert row == {"text": b"a"}
        assert list(folder.iterdir())
    assert tempfile.tempdir == str(tmp_path / "missing")
    assert not list(tmp_path.iterdir())
