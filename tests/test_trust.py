"""Files from untrusted sources are loaded and shown safely.

Files that are loaded cannot run code. Archives cannot write outside their folder. Downloads are
checked before use. Pages escape the text that they show.
"""

import hashlib
import importlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import requests
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from configs import babi as babi_config
from configs import digits, ptb
from experiments import config, tasks
from experiments.datasets import babi, cnn, prepared, text8
from experiments.records import workdir
from experiments.runtime.errors import UserError
from scripts import inspect_reader
from scripts.inspect_reader import IN_PASSAGE, RIGHT, Bar, Inspection, Word


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


# ---- Files of data and runs with pickled objects that would run code.


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def payload(tmp_path):
    """An array with an object that must never be unpickled; the test fails if it was."""
    sprung = tmp_path / "sprung"
    array = np.array([Payload(sprung), None], object)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    file.seek(0)
    np.load(file, allow_pickle=True)
    sprung.rmdir()  # the payload works
    yield array
    assert not sprung.exists()


def spoil(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file of a prepared data set, and updates the manifest to match."""
    path = folder / f"{name}.npy"
    path.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    sha256 = hashlib.sha256(content).hexdigest()
    manifest["files"][path.name] = {"bytes": len(content), "sha256": sha256}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.fixture
def data_dir(tmp_path):
    """A data_dir with one small data set."""
    images = np.zeros((3, 4), np.uint8)
    prepared.write(tmp_path / "data/prepared/digits", {"train_images": images}, {}, {})
    return tmp_path / "data"


@pytest.mark.parametrize("form", ["object", "structured", "pickle", "text", "empty"])
def test_non_numeric_prepared_data_raises(data_dir, payload, form):
    folder = data_dir / "prepared/digits"
    content = {
        "object": npy(payload),
        "structured": npy(np.array([(payload[0],)], [("a", object)])),
        "pickle": npy(payload)[npy(payload).index(b"\n") + 1 :],
        "text": b"cos\nsystem\n(S'true'\ntR.",
        "empty": b"",
    }[form]
    spoil(folder, "train_images", content)
    with pytest.raises(UserError) as error:
        prepared.load("digits", str(data_dir))
    path = folder / "train_images.npy"
    assert one_line(error).startswith(f"{path} is damaged: not an array of numbers; delete the fo")


@pytest.mark.parametrize("name", ["../secret", "/secret", "a/../../secret"])
def test_manifest_paths_outside_the_folder_raise(data_dir, name):
    folder = data_dir / "prepared/digits"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["arrays"] = {name: manifest["arrays"]["train_images"]}
    manifest["files"] = {f"{name}.npy": manifest["files"]["train_images.npy"]}
    manifest["digest"] = prepared._digest(manifest["arrays"], manifest["info"])
    shutil.copy(folder / "train_images.npy", folder.parent / "secret.npy")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        prepared.load("digits", str(data_dir))
    assert "manifest.json is damaged" in one_line(error)


@pytest.mark.parametrize("field", ["update", "layer/cell_mean"])
def test_pickled_objects_in_statistics_raise(tmp_path, payload, field):
    arrays = {"update": np.int64(7), "layer/cell_mean": np.zeros(3)}
    path = tmp_path / workdir.STATISTICS_NAME
    path.write_bytes(npz(**arrays))
    assert workdir.read_statistics(tmp_path, 7) is not None
    path.write_bytes(npz(**arrays | {field: payload}))
    with pytest.raises(UserError) as error:
        workdir.read_statistics(tmp_path, 7)
    assert one_line(error).startswith(f"{path} is damaged: delete it")


def run_config() -> dict:
    return json.loads(digits.get_config().to_json_best_effort())


STRANGE = ["", "[]", "5", "null", '"text"', "{", "\0", "[" * 100_000, "\x80\x04K\x05."]


@pytest.mark.parametrize("name", ["config.json", "run.json"])
@pytest.mark.parametrize("content", STRANGE, ids=range(len(STRANGE)))
def test_malformed_run_files_raise(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        {"config.json": workdir.read_config, "run.json": workdir.read_record}[name](tmp_path)
    assert one_line(error).startswith(f"{tmp_path / name} is damaged: ")


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", "1"),
        ("seed", None),
        ("seed", [1]),
        ("seed", {"py/object": "os.system"}),
        ("batch_size", 1.5),
        ("model", 5),
        ("model", []),
        ("optimizer", {}),
        ("optimizer", {"name": ["adam"]}),
        ("data_dir", 7),
        ("log_every", {"seconds": 3}),
    ],
)
def test_run_config_with_wrong_types_raises(tmp_path, field, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run_config()))
    config.check(workdir.read_config(tmp_path))
    path.write_text(json.dumps(run_config() | {field: value}))
    with pytest.raises(UserError) as error:
        workdir.read_config(tmp_path)
    whole = f"{path} is damaged, or of another version: config.{field}"
    assert one_line(error).startswith(whole)


@pytest.mark.parametrize("file", [digits, ptb, babi_config])  # of each task
def test_missing_config_field_is_named_in_the_error(file):
    whole = file.get_config()
    tasks.module(whole).check(whole)
    fields = flatten_dict(whole.to_dict(), sep=".")
    assert len(fields) > 30
    for field in fields.keys() - {"task"}:
        rest = {name: value for name, value in fields.items() if name != field}
        lacking = ConfigDict(unflatten_dict(rest, sep="."))
        with pytest.raises(UserError) as error:
            tasks.module(whole).check(lacking)
        assert one_line(error).startswith(f"config.{field} is missing: it must be of type ")


def test_config_cannot_import_other_modules(tmp_path, monkeypatch):
    """Only a module of `experiments.tasks` is a task, whatever else can be imported."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nTask = print")
    monkeypatch.syspath_prepend(tmp_path)
    from experiments import tasks

    for name in ("evil", "..evil", "../evil", "char_lm.jax", ""):
        with pytest.raises(UserError) as error:
            tasks.load(ConfigDict({"task": name}))
        assert one_line(error).startswith("config.task is ")
    for name in ("..evil", "corpus", "cnn.x", "../../evil"):
        with pytest.raises(UserError):
            prepared.load(name, str(tmp_path))
    assert not (tmp_path / "sprung").exists()


# ---- Archives: only expected members are read, and nothing is written under a member's name.

EVIL = ("../evil", "a/../../evil", "..\\evil", "~/evil")


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def tar(path: Path, contents: dict[str, bytes], links: dict[str, str], outside: Path) -> None:
    """An archive whose first members would write outside, followed by the expected members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name in (*EVIL, str(outside / "evil")):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            for name, target in links.items():
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, target
                archive.addfile(member)
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder outside, with a file that must not be read or changed."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    monkeypatch.chdir(folder)
    yield folder
    assert snapshot(folder) == {"secret"} and (folder / "secret").read_bytes() == b"secret"


def question(text: str) -> tuple[str, bytes]:
    content = f"http://x\n\n{text}\n\n@placeholder ?\n\n@entity1\n\n@entity1:A".encode()
    return f"{hashlib.sha1(content).hexdigest()}.question", content


@pytest.mark.parametrize("linked", [False, True])
def test_cnn_archive_cannot_access_outside_files(tmp_path, outside, linked):
    name, content = question("@entity1 spoke .")
    contents = {f"cnn/questions/{folder}/{name}": content for folder in cnn.FOLDERS}
    target = str(outside / "secret")
    links = {"cnn/questions": str(outside), "x": target}
    if linked:
        links |= {f"cnn/questions/test/{'0' * 40}.question": target}
    tar(tmp_path / "in/cnn.tgz", contents, links, outside)
    before = snapshot(tmp_path)
    read = list(cnn.read_files(tmp_path / "in/cnn.tgz"))
    assert snapshot(tmp_path) == before
    contents = [file.content for file in read]
    assert contents.count(content) == 3 and b"secret" not in contents
    assert all(file.is_whole() for file in read) != linked
    if linked:
        with pytest.raises(UserError) as error:
            cnn.prepare(tmp_path / "in", tmp_path)
        assert "holds damaged files" in one_line(error)


@pytest.mark.parametrize("linked", [False, True])
def test_babi_archive_cannot_access_outside_files(tmp_path, outside, monkeypatch, linked):
    texts = {name: f"1 Mary went.\n2 {name}".encode() for name in babi.SHA256}
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    first = next(iter(texts))
    hashes[first] = hashlib.sha256(b"secret").hexdigest() if linked else hashes[first]
    monkeypatch.setattr(babi, "SHA256", hashes)
    contents = {f"tasks/en-10k/{name}": text for name, text in texts.items()}
    links = {"tasks": str(outside)}
    if linked:
        del contents[f"tasks/en-10k/{first}"]
        links[f"tasks/en-10k/{first}"] = str(outside / "secret")
    path = tmp_path / "in" / babi.ARCHIVE
    tar(path, contents, links, outside)
    before = snapshot(tmp_path)
    if linked:  # even though the link's target has the right content
        with pytest.raises(UserError) as error:
            babi._read_texts(path)
        assert f"lacks {first}" in one_line(error)
    else:
        assert sorted(babi._read_texts(path)) == sorted(f"{t}_{s}" for t in babi.TASKS
                                                        for s in ("train", "test"))  # fmt: skip
    assert snapshot(tmp_path) == before


def test_text8_archive_cannot_access_outside_files(tmp_path, outside):
    path = tmp_path / "text8.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*EVIL, str(outside / "evil"), "../text8", "/text8"):
            archive.writestr(name, b"evil")
        archive.writestr("text8", b"the text")
    before = snapshot(tmp_path)
    assert text8.read_text(path) == b"the text"
    assert snapshot(tmp_path) == before


# ---- Downloads and original files: wrong files of the real data sets are not prepared.


@pytest.fixture
def host(monkeypatch):
    """Every host answers every request with a wrong file. The value lists the requests."""
    asked = []

    def send(self, request, **kwargs):
        asked.append((request.method, request.url))
        response = requests.Response()
        response.url, response.request, response.status_code = request.url, request, 200
        response.raw = io.BytesIO(b"not what was promised")
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    return asked


@pytest.mark.parametrize("name", ["babi", "mnist", "ptb", "text8"])
def test_downloads_with_wrong_content_raise(tmp_path, host, name):
    with pytest.raises(UserError) as error:
        prepared.load(name, str(tmp_path))
    assert one_line(error).count("(sent another file)") >= 2
    assert any(method == "GET" for method, _ in host)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mnist", "ptb", "text8"])
def test_corrupt_original_files_raise(tmp_path, host, name):
    """Even if the size is right."""
    file = importlib.import_module(f"experiments.datasets.{name}").ORIGINALS.files[0]
    path = tmp_path / name / file.name
    path.parent.mkdir()
    with path.open("wb") as spoilt:
        spoilt.truncate(file.size)
    with pytest.raises(UserError) as error:
        prepared.load(name, str(tmp_path))
    assert one_line(error).startswith(f"{path} is damaged: {file.size} bytes, SHA-256 ")
    assert host == [] and [p.name for p in tmp_path.rglob("*")] == [name, file.name]


# ---- Pages: malicious texts add no HTML elements to a page.

NASTY = (
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onclick='alert(1)",
    "</span></title><img src=x onerror=alert(1)>",
    "a&b;&lt;&#60;script&#62;",
    "]]><!--",
    "{{ where }} {% endblock %}",
    "javascript:alert(1)",
)


class Outline(HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.text, self.values = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value for _, value in attrs]

    def handle_endtag(self, tag):
        self.elements.append(f"/{tag}")

    def handle_comment(self, data):
        self.elements.append("comment")

    def handle_decl(self, decl):
        self.elements.append(decl)

    unknown_decl = handle_pi = handle_comment

    def handle_data(self, data):
        self.text.append(data)


def page_of(text: str) -> str:
    """A reader's page with `text` in every place that data or files can fill."""
    answer, entity = f"answer{text}", f"@entity{text}"
    words = [Word(f"a{text}", f"b{text}"), Word(answer, answer), Word(entity, entity)]
    found = Inspection(
        passage=words,
        question=words,
        answer=answer,
        attention=np.array([0.5, 0.3, 0.2], np.float32),
        answers=[Bar(answer, 0.5, [IN_PASSAGE, RIGHT]), Bar(f"c{text}", 0.1, [])],
        entities=[Bar(entity, 0.2, [])],
        right=False,
        verdict=f"Wrong: {text}",
    )
    names = {entity: f"name{text}"}
    return inspect_reader.make_page(found, names, f"where{text}", f"how{text}", 9)


@pytest.mark.parametrize("text", NASTY)
def test_pages_escape_malicious_text(text):
    plain, page = Outline(page_of("plain")), Outline(page_of(text))
    assert page.elements == plain.elements
    shown, harmless = "".join(page.text), "".join(plain.text)
    assert shown.count(text) == harmless.count("plain") > 10
    titles = [value for value in page.values if value and f"read as b{text}" in value]
    assert len(titles) == 1
