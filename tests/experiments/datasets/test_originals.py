import dataclasses
import hashlib
import http.server
import io
import socket
import sys
import threading
from pathlib import Path

import pytest
import requests
import tensorflow_datasets as tfds

from experiments.datasets import babi, mnist, originals, ptb, text8
from experiments.datasets.originals import Original, Originals
from experiments.runtime import progress
from experiments.runtime.errors import UserError

HOST = "https://example.org/words"
CONTENTS = {"first.txt": b"one\ntwo\n", "second.txt": b"three\n"}
WORDS = Originals(
    "words",
    "Three words",
    tuple(
        Original(name, len(content), hashlib.sha256(content).hexdigest(), (f"{HOST}/{name}",))
        for name, content in CONTENTS.items()
    ),
)


class Words(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, paths, **kwargs):
        self.paths = paths
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict({"word": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"words": self._generate_examples([self.paths[name] for name in CONTENTS])}

    def _generate_examples(self, paths):
        words = b"".join(path.read_bytes() for path in paths).split()
        yield from enumerate({"word": word} for word in words)


def read_words(source_dir: Path, words: Originals = WORDS) -> tuple[list[bytes], dict]:
    def builder_of(paths, data_dir):
        return Words(paths=paths, data_dir=data_dir)

    with words.built(source_dir, builder_of) as (builder, source):
        return [example["word"] for example in originals.examples(builder, "words")], source


def place(folder: Path, names=CONTENTS) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(CONTENTS[name])


def words_error(source_dir: Path, words: Originals = WORDS) -> str:
    with pytest.raises(UserError) as caught:
        read_words(source_dir, words)
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
        raise requests.ConnectionError("no route")

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
    assert source["files"] == [
        {"name": file.name, "size": file.size, "sha256": file.sha256, "downloaded_from": None}
        for file in WORDS.files
    ]
    assert capfd.readouterr() == ("", "")


def test_missing_file_is_downloaded(tmp_path, host, capfd):
    place(tmp_path, ["first.txt"])
    files, asked = host
    files[f"{HOST}/second.txt"] = CONTENTS["second.txt"]
    words, source = read_words(tmp_path)
    assert words == [b"one", b"two", b"three"]
    assert asked == [("GET", f"{HOST}/second.txt")]
    assert [file["downloaded_from"] for file in source["files"]] == [None, f"{HOST}/second.txt"]
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
    monkeypatch.setattr(originals, "ANSWER_SECONDS", 0.1)
    assert "(no answer)" in words_error(tmp_path)
    over.set()


class Server(http.server.BaseHTTPRequestHandler):
    """Sends files, and fails as the first folder of the path says."""

    def do_GET(self):
        _, folder, name = self.path.split("/")
        content = CONTENTS[name]
        if folder.isdecimal():
            self.send_error(int(folder))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if folder == "good":  # as hosts say of .gz files, which are not to be unpacked
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if folder == "other":
            content = content[::-1]
        self.wfile.write(content[:-1] if folder == "broken" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def mirrors(monkeypatch):
    """The three words, at several addresses of a server: `mirrors("404", "good")`."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def words(*folders: str) -> Originals:
            hosts = [f"http://127.0.0.1:{server.server_port}/{folder}" for folder in folders]
            files = [
                file._replace(urls=tuple(f"{host}/{file.name}" for host in hosts))
                for file in WORDS.files
            ]
            return dataclasses.replace(WORDS, files=tuple(files))

        yield words
        server.shutdown()


@pytest.mark.parametrize("first", ["404", "503", "other", "broken"])
def test_next_address_is_tried(tmp_path, mirrors, first, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_LOGGED", -1)
    originals = mirrors(first, "good")
    words, source = read_words(tmp_path, originals)
    shown = capsys.readouterr().out
    assert all(f"Downloading {file.urls[1]}: 1 of 1, " in shown for file in originals.files)
    assert words == [b"one", b"two", b"three"]
    assert [file["downloaded_from"] for file in source["files"]] == [
        file.urls[1] for file in originals.files
    ]


def test_error_says_what_each_address_answered(tmp_path, mirrors):
    originals = mirrors("404", "503", "other", "broken")
    with socket.socket() as free:  # nobody listens at this port
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/first.txt"
        file = originals.files[0]
        files = (file._replace(urls=(*file.urls, url)), originals.files[1])
        message = words_error(tmp_path, dataclasses.replace(originals, files=files))
    not_found, unavailable, other, broken = file.urls
    assert message.startswith(f"Three words cannot be downloaded from {not_found} (404 Not Found) ")
    for answer in (
        f"{unavailable} (503 Service Unavailable)",
        f"{other} (sent another file)",
        f"{broken} (IncompleteRead(7 bytes read, 1 more expected))",
        f"{url} (Connection refused)",
    ):
        assert f" or {answer}" in message
    assert message.endswith(
        "get first.txt, second.txt elsewhere, as on a machine with network, and place them in the "
        f"folder {tmp_path / 'words'}"
    )


def test_rows_of_a_name_are_addresses_of_one_file(tmp_path):
    rows = [("u/1", 5, "a", "x"), ("v/1", 5, "a", "x"), ("u/2", 6, "b", "y")]
    table = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    (tmp_path / "checksums.tsv").write_text(table)
    assert Originals.beside(str(tmp_path / "module.py"), "Title").files == (
        Original("x", 5, "a", ("u/1", "v/1")),
        Original("y", 6, "b", ("u/2",)),
    )


@pytest.mark.parametrize(
    ("module", "title", "names"),
    [
        (babi, "bAbI", "tasks_1-20_v1-2.tar.gz"),
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
    assert message.count("(no route)") >= 2 and f"{names} elsewhere" in message
    assert message.endswith(f"in the folder {tmp_path / module.ORIGINALS.name}")
    assert list(tmp_path.iterdir()) == []
