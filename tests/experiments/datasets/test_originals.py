import dataclasses
import hashlib
import http.server
import socket
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import datasets
from experiments.datasets import examples, originals
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


@pytest.fixture
def get(tmp_path):
    """Contents of the originals in the folder `source`, and where they were downloaded from."""
    (tmp_path / "work").mkdir()

    def contents(words: Originals = WORDS) -> tuple[dict[str, bytes], list[str | None]]:
        paths, files = words.get(tmp_path / "source", tmp_path / "work")
        assert [{**f, "downloaded_from": 0} for f in files] == [
            {"name": f.name, "size": f.size, "sha256": f.sha256, "downloaded_from": 0}
            for f in words.files
        ]
        read = {name: path.read_bytes() for name, path in paths.items()}
        return read, [file["downloaded_from"] for file in files]

    return contents


def place(folder, names=CONTENTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(CONTENTS[name])


@pytest.mark.parametrize("subfolder", ["", "words"])
def test_local_files_are_used(tmp_path, get, host, subfolder):
    place(tmp_path / "source" / subfolder)
    assert get() == (CONTENTS, [None, None])


def test_missing_file_is_downloaded(tmp_path, get, host):
    place(tmp_path / "source", ["first.txt"])
    host[f"{HOST}/second.txt"] = CONTENTS["second.txt"]
    assert get() == (CONTENTS, [None, f"{HOST}/second.txt"])
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["first.txt"]


@pytest.mark.parametrize("content", [b"thr", b"trhee\n"])
def test_damaged_file_is_reported(tmp_path, get, content):
    place(tmp_path / "source" / "words")
    path = tmp_path / "source" / "words" / "second.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        get()
    assert str(path) in str(caught.value) and f"{HOST}/second.txt" in str(caught.value)


class Server(http.server.BaseHTTPRequestHandler):
    """Sends files; the first folder of the path selects how it fails."""

    def do_GET(self):
        _, folder, name = self.path.split("/")
        content = CONTENTS[name]
        if folder.isdecimal():
            self.send_error(int(folder))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if folder == "good":  # some hosts send it for .gz files, which must stay packed
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if folder == "other":
            content = content[::-1]
        self.wfile.write(content[:-1] if folder == "broken" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def mirrors(monkeypatch):
    """`WORDS` with several addresses of a server, by `mirrors("404", "good")`."""
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


@pytest.mark.parametrize("first", ["404", "other", "broken"])
def test_next_url_is_tried_after_a_failure(get, mirrors, first, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_LOGGED", -1)
    words = mirrors(first, "good")
    assert get(words) == (CONTENTS, [file.urls[1] for file in words.files])
    shown = capsys.readouterr().out
    assert all(f"Downloading {file.urls[1]}: 1 of 1, " in shown for file in words.files)


def test_download_error_lists_the_failure_of_each_url(tmp_path, get, mirrors):
    words = mirrors("404", "503", "other", "broken")
    with socket.socket() as free:  # nobody listens at this port
        free.bind(("127.0.0.1", 0))
        unheard = f"http://127.0.0.1:{free.getsockname()[1]}/first.txt"
        file = words.files[0]
        files = (file._replace(urls=(*file.urls, unheard)), words.files[1])
        with pytest.raises(UserError) as caught:
            get(dataclasses.replace(words, files=files))
    answers = ("404 Not Found", "503 Service Unavailable", "sent another file", "IncompleteRead")
    for url, answer in zip((*file.urls, unheard), (*answers, "Connection refused"), strict=True):
        assert f"{url} ({answer}" in str(caught.value)
    assert "get first.txt, second.txt elsewhere" in str(caught.value)
    assert str(tmp_path / "source" / "words") in str(caught.value)


def test_unresponsive_host_times_out(get, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(originals, "TIMEOUT", (1, 0.1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/first.txt"
        words = dataclasses.replace(WORDS, files=(WORDS.files[0]._replace(urls=(url,)),))
        with pytest.raises(UserError, match="timed out"):
            get(words)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("babi", "tasks_1-20_v1-2.tar.gz"),
        ("mnist", "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz"),
        ("ptb", "ptb.train.txt, ptb.valid.txt, ptb.test.txt"),
        ("text8", "text8.zip"),
    ],
)
def test_missing_files_error_names_files_and_folder(tmp_path, load_error, name, missing):
    message = load_error(name, tmp_path)
    assert message.count("(404)") >= 2 and missing in message
    assert message.endswith(str(tmp_path / name))


# ---- Examples through TensorFlow Datasets.


def test_examples_are_read_in_order(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    features = {
        "text": tfds.features.Text(),
        "row": tfds.features.Tensor(shape=(2,), dtype=np.uint8, encoding="bytes"),
    }
    splits = {
        split: [{"text": f"é{i}", "row": np.array([i, 7], np.uint8)} for i in range(size)]
        for split, size in {"long": 200, "short": 1}.items()
    }
    found = examples.read(features, {split: iter(rows) for split, rows in splits.items()}, tmp_path)
    assert found.keys() == splits.keys()
    for split, rows in splits.items():
        assert [row["text"].decode() for row in found[split]] == [row["text"] for row in rows]
        np.testing.assert_array_equal([r["row"] for r in found[split]], [r["row"] for r in rows])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "importlib_resources"])
def test_missing_package_is_reported(tmp_path, monkeypatch, load_error, package):
    for module in ("ptb", "examples"):
        monkeypatch.delitem(sys.modules, f"experiments.datasets.{module}", raising=False)
        monkeypatch.delattr(datasets, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    message = load_error("ptb", tmp_path)
    assert package in message and "pip install -r requirements.txt" in message
