import gzip
import io
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import requests

from experiments.datasets import load, mnist
from experiments.errors import UserError

REPOSITORY = Path(__file__).parents[3]
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
    """A data_dir with MNIST prepared from local files, and none of the originals left."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(originals, folder / "mnist")
    load("mnist", str(folder))
    shutil.rmtree(folder / "mnist")
    return folder


def use_network(monkeypatch, send):
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(self, request, **kwargs):
        raise requests.ConnectionError

    use_network(monkeypatch, refuse)


@pytest.fixture
def host(monkeypatch):
    """A download host that serves the files put into this dict; it lists what was asked for."""
    files, asked = {}, []

    def send(self, request, **kwargs):
        asked.append((request.method, request.url))
        response = requests.Response()
        response.url, response.request = request.url, request
        content = files.get(request.url)
        response.status_code = 404 if content is None else 200
        response.raw = io.BytesIO(content or b"")
        return response

    use_network(monkeypatch, send)
    return files, asked


def prepare_error(source_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        mnist.prepare(source_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_arrays_are_those_of_the_original_files(prepared_mnist, originals):
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


def test_prepared_mnist_needs_no_tfds(prepared_mnist):
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from experiments.datasets import load\n"
        "print(load('mnist', sys.argv[1]).digest)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, prepared_mnist],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == load("mnist", str(prepared_mnist)).digest, result.stderr


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "importlib_resources"])
def test_preparing_without_tfds_says_what_to_do(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = prepare_error(tmp_path)
    assert package in message
    assert f"copy {tmp_path / 'prepared' / 'mnist'} from" in message
    assert "pip install -r requirements.txt" in message


@pytest.mark.parametrize("subfolder", ["", "mnist"])
def test_damaged_original_is_found_before_tfds(originals, tmp_path, monkeypatch, subfolder):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        shutil.copyfile(originals / name, folder / name)
    data = (folder / NAMES[0]).read_bytes()

    (folder / NAMES[0]).write_bytes(data[: len(data) // 2])
    message = prepare_error(tmp_path)
    assert message.startswith(f"{folder / NAMES[0]} is damaged: {len(data) // 2} bytes")
    assert "440fcabf73cc" in message and "fetch it again" in message

    (folder / NAMES[0]).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the right size
    message = prepare_error(tmp_path)
    assert message.startswith(f"{folder / NAMES[0]} is damaged: {len(data)} bytes")


def test_without_files_and_network_says_where_to_place_them(tmp_path, no_network):
    message = prepare_error(tmp_path)
    assert "(ConnectionError)" in message
    assert all(name in message for name in NAMES)
    assert f"in the folder {tmp_path / 'mnist'}" in message


def test_silent_network_is_not_waited_for(tmp_path, monkeypatch):
    over = threading.Event()

    def wait(self, request, **kwargs):
        over.wait()
        raise requests.ConnectionError

    use_network(monkeypatch, wait)
    monkeypatch.setattr(mnist, "PROBE_SECONDS", 0.1)
    assert "(no answer)" in prepare_error(tmp_path)
    over.set()


def test_missing_file_is_downloaded(
    originals, prepared_mnist, tmp_path, tmp_path_factory, host, monkeypatch, capfd
):
    for name in NAMES[:3]:
        (tmp_path / name).symlink_to(originals / name)
    work_dir = tmp_path_factory.mktemp("work")
    monkeypatch.setattr("tempfile.tempdir", str(work_dir))
    url = f"https://storage.googleapis.com/cvdf-datasets/mnist/{NAMES[3]}"
    files, asked = host
    files[url] = (originals / NAMES[3]).read_bytes()
    arrays, _, source = mnist.prepare(tmp_path)
    assert asked == [("HEAD", url), ("GET", url)]
    assert [file["url"] for file in source["files"] if file["downloaded"]] == [url]
    for name, array in load("mnist", str(prepared_mnist)).arrays.items():
        np.testing.assert_array_equal(arrays[name], array)
    assert capfd.readouterr() == ("", "")
    assert not [path for path in work_dir.rglob("*") if path.is_file()]


def test_damaged_download_is_reported(originals, tmp_path, host):
    for name in NAMES[:3]:
        (tmp_path / name).symlink_to(originals / name)
    files, _ = host
    files[f"https://storage.googleapis.com/cvdf-datasets/mnist/{NAMES[3]}"] = b"not labels"
    assert "NonMatchingChecksumError" in prepare_error(tmp_path)


def test_refusing_host_is_reported(tmp_path, host):
    assert "(HTTPError)" in prepare_error(tmp_path)
