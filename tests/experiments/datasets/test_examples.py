import pytest
import tensorflow_datasets as tfds

from experiments.datasets import examples
from tests.full_disk import files_of_at_most

FEATURES = {"text": tfds.features.Text()}


def test_full_disk_raises_an_os_error(tmp_path):
    rows = ({"text": f"{n} {'x' * 1000}"} for n in range(3000))
    with files_of_at_most(1000), pytest.raises(OSError, match=r"File too large") as caught:
        examples.read(FEATURES, {"train": rows}, tmp_path)
    assert "\n" not in str(caught.value)


def test_temporary_files_are_in_the_work_folder_and_removed(tmp_path):
    opened = []

    def rows():
        opened.extend(tmp_path.iterdir())
        yield {"text": "a"}

    (row,) = examples.read(FEATURES, {"train": rows()}, tmp_path)["train"]
    assert row == {"text": b"a"} and len(opened) == 1
    assert not list(tmp_path.iterdir())
