import hashlib
import io
import sys
import threading
from pathlib import Path

import pytest
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo

from experiments.datasets import mnist, originals, ptb, text8
from experiments.datasets.originals import Original, Originals
from experiments.errors import UserError

HOST = "https://example.org/words"
CONTENTS = {"first.txt": b"one\ntwo\n", "second.txt": b"three\n"}
WORDS = Originals(
    "words",
    "Three words",
    tuple(
        Original(f"{HOST}/{name}", len(content), hashlib.sha256(content).hexdigest(), name)
        for name, content in CONTENTS.items()
    ),
)


class Words(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {  # noqa: RUF012
        file.url: UrlInfo(file.size, file.sha256, file.name) for file in WORDS.files
    }

    def _info(self):
        features = tfds.features.FeaturesDict({"word": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        paths = dl_manager.download({file.name: file.url for file in WORDS.files})
        return {"words": self._generate_examples([paths[name] for name in CONTENTS])}

    def _generate_examples(self, paths):
        words = b"".join(path.read_bytes() for path in paths).split()
        yield from enumerate({"word": word} for word in words)


def read_words(source_dir: Path) -> tuple[list[bytes], dict]:
    with WORDS.built(source_dir, lambda data_dir: Words(data_dir=data_dir)) as (builder, source):
        return [example["word"] for example in originals.examples(builder, "words")], source


def place(folder: Path, names=CONTENTS) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(CONTENTS[name])


def words_error(source_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_words(source_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def work_dir(tmp_path_factory, monkeypatch):
    """Where temporary files go; none may be left."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert not [path for path in folder.rglob("*") if path.is_file()]


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


@pytest.mark.parametrize("subfolder", ["", "words"])
def test_files_at_hand_need_no_network(tmp_path, no_network, subfolder, capfd):
    place(tmp_path / subfolder)
    words, source = read_words(tmp_path)
    assert words == [b"one", b"two", b"three"]
    assert source["files"] == [file._asdict() | {"downloaded": False} for file in WORDS.files]
    assert capfd.readouterr() == ("", "")


def test_missing_file_is_downloaded(tmp_path, host, capfd):
    place(tmp_path, ["first.txt"])
    files, asked = host
    files[f"{HOST}/second.txt"] = CONTENTS["second.txt"]
    words, source = read_words(tmp_path)
    assert words == [b"one", b"two", b"three"]
    assert asked == [("HEAD", f"{HOST}/second.txt"), ("GET", f"{HOST}/second.txt")]
    assert [file["downloaded"] for file in source["files"]] == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["first.txt"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "importlib_resources"])
def test_preparing_without_tfds_says_what_to_do(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = words_error(tmp_path)
    assert message.startswith("Three words is not prepared") and package in message
    assert f"copy {tmp_path / 'prepared' / 'words'} from" in message
    assert "python -m scripts.prepare_data words ran" in message
    assert "pip install -r requirements.txt" in message


@pytest.mark.parametrize("subfolder", ["", "words"])
@pytest.mark.parametrize("content", [b"thr", b"trhee\n"])
def test_damaged_original_is_found_before_tfds(tmp_path, monkeypatch, subfolder, content):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    place(tmp_path / subfolder)
    path = tmp_path / subfolder / "second.txt"
    path.write_bytes(content)
    message = words_error(tmp_path)
    assert message.startswith(f"{path} is damaged: {len(content)} bytes")
    assert f"6 bytes, SHA-256 {WORDS.files[1].sha256[:12]}" in message
    assert f"fetch it again from {HOST}/second.txt" in message


def test_silent_network_is_not_waited_for(tmp_path, monkeypatch):
    over = threading.Event()

    def wait(self, request, **kwargs):
        over.wait()
        raise requests.ConnectionError

    use_network(monkeypatch, wait)
    monkeypatch.setattr(originals, "PROBE_SECONDS", 0.1)
    assert "(no answer)" in words_error(tmp_path)
    over.set()


def test_refusing_host_is_reported(tmp_path, host):
    assert "(HTTPError)" in words_error(tmp_path)


def test_damaged_download_is_reported(tmp_path, host):
    place(tmp_path, ["first.txt"])
    files, _ = host
    files[f"{HOST}/second.txt"] = b"four\n"
    assert "(NonMatchingChecksumError)" in words_error(tmp_path)


@pytest.mark.parametrize(
    ("module", "title", "names"),
    [
        (mnist, "MNIST", "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz"),
        (ptb, "Penn Treebank", "ptb.test.txt, ptb.train.txt, ptb.valid.txt"),
        (text8, "text8", "text8.zip"),
    ],
)
def test_without_files_and_network_says_where_to_place_them(
    tmp_path, no_network, module, title, names
):
    with pytest.raises(UserError) as caught:
        module.prepare(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{title} cannot be downloaded from http")
    assert "(ConnectionError)" in message and names in message
    assert f"in the folder {tmp_path / module.ORIGINALS.name}, copied" in message
    assert list(tmp_path.iterdir()) == []
