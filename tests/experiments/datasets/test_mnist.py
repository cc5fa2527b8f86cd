import gzip
import json
import shutil

import numpy as np
import pytest

from experiments.datasets import load

NAMES = [
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
]


@pytest.fixture(scope="session")
def originals(data_dir):
    folder = data_dir / "mnist"
    if not all((folder / name).exists() for name in NAMES):
        pytest.skip(f"needs the four original MNIST files in {folder}")
    return folder


@pytest.fixture(scope="session")
def prepared_mnist(originals, tmp_path_factory):
    """A data_dir with MNIST prepared from local files, without the original files."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(originals, folder / "mnist")
    load("mnist", str(folder))
    shutil.rmtree(folder / "mnist")
    return folder


def test_arrays_match_the_original_files(prepared_mnist, originals):
    dataset = load("mnist", str(prepared_mnist))

    def values(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((originals / name).read_bytes())[header:], np.uint8)

    expected = {}
    images, labels = values(NAMES[0], 16).reshape(60000, 784), values(NAMES[1], 8)
    expected["train_images"], expected["valid_images"] = images[:50000], images[50000:]
    expected["train_labels"], expected["valid_labels"] = labels[:50000], labels[50000:]
    expected["test_images"] = values(NAMES[2], 16).reshape(10000, 784)
    expected["test_labels"] = values(NAMES[3], 8)
    assert dataset.arrays.keys() == expected.keys()
    for name, array in dataset.arrays.items():
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, expected[name])
    assert dataset.info == {"num_classes": 10, "max_pixel": 255, "image_side": 28}


def test_unpacked_files_give_the_same_dataset(prepared_mnist, originals, tmp_path):
    """In torchvision's folders, one beside its packed file, and in the data folder."""
    folders = [tmp_path / "MNIST" / "raw", tmp_path / "mnist" / "MNIST" / "raw", tmp_path]
    for name, folder in zip(NAMES, [*folders, tmp_path], strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        content = gzip.decompress((originals / name).read_bytes())
        (folder / name).with_suffix("").write_bytes(content)
    shutil.copy(originals / NAMES[0], folders[0])
    assert load("mnist", str(tmp_path)).digest == load("mnist", str(prepared_mnist)).digest
    manifest = json.loads((tmp_path / "prepared" / "mnist" / "manifest.json").read_text())
    used = {file["name"] for file in manifest["source"]["files"]}
    assert used == {NAMES[0], *(name.removesuffix(".gz") for name in NAMES[1:])}


def test_damaged_unpacked_file_is_reported(tmp_path, load_error):
    path = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(10_008))
    message = load_error("mnist", tmp_path)
    assert message.startswith(f"{path} is damaged") and "t10k-labels-idx1-ubyte.gz" in message
