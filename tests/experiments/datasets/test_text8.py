import functools
import gzip
import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets import text8
from experiments.datasets.originals import Originals

VOCABULARY = " abcdefghijklmnopqrstuvwxyz"
SIZE = 5_000
SYMBOLS = np.random.default_rng(0).integers(0, 27, SIZE).astype(np.uint8)
TEXT = "".join(VOCABULARY[symbol] for symbol in SYMBOLS).encode()

# Without a time stamp: contents are part of the names of tests, which must not change.
compress = functools.partial(gzip.compress, mtime=0)


@pytest.fixture(scope="module")
def zipped(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("zip") / "text8.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", TEXT)
    return path.read_bytes()


@pytest.fixture
def small(monkeypatch, zipped):
    """A text8 of 5,000 characters takes the place of the real one."""
    file = text8.ZIP._replace(size=len(zipped), sha256=hashlib.sha256(zipped).hexdigest())
    monkeypatch.setattr(text8, "ORIGINALS", Originals("text8", "text8", (file,)))
    monkeypatch.setattr(text8, "SIZE", SIZE)
    monkeypatch.setattr(text8, "MD5", hashlib.md5(TEXT).hexdigest())
    monkeypatch.setattr(text8, "BLOCK", 999)  # the last block is short


def place(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("subfolder", ["", "text8"])
@pytest.mark.parametrize("kind", ["zip", "plain", "prefix"])
def test_zip_plain_and_prefix_files_are_read(tmp_path, small, zipped, subfolder, kind):
    name, content, size = {
        "zip": ("text8.zip", zipped, SIZE),
        "plain": ("text8", TEXT, SIZE),
        "prefix": ("text8_first_3000.gz", compress(TEXT[:3000]), 3000),
    }[kind]
    place(tmp_path / subfolder / name, content)
    arrays, info, source = text8.prepare(tmp_path, tmp_path)
    assert arrays.keys() == {"text"} and arrays["text"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["text"], SYMBOLS[:size])
    assert info == {"vocabulary": VOCABULARY, "complete": kind != "prefix"}
    md5 = hashlib.md5(TEXT[:size]).hexdigest()
    assert source["text"] == {"file": name, "characters": size, "md5": md5}
    assert [(file["name"], file["size"], file["downloaded_from"]) for file in source["files"]] == (
        [(name, len(content), None)] if kind == "zip" else []
    )


def test_files_are_read_in_order_of_preference(tmp_path, small, zipped):
    place(tmp_path / "text8_first_20.gz", compress(TEXT[:20]))
    place(tmp_path / "text8_first_x.gz", b"of another name")
    place(tmp_path / "text8" / "text8_first_100.gz", compress(TEXT[:100]))

    def taken() -> str:
        return text8.prepare(tmp_path, tmp_path)[2]["text"]["file"]

    assert taken() == "text8_first_100.gz"
    place(tmp_path / "text8" / "text8", TEXT)
    assert taken() == "text8"
    place(tmp_path / "text8" / "text8.zip", zipped)
    assert taken() == "text8.zip"


def test_prefix_of_full_length_is_the_complete_text(tmp_path, small, load_error):
    path = place(tmp_path / f"text8_first_{SIZE}.gz", compress(TEXT))
    assert text8.prepare(tmp_path, tmp_path)[1]["complete"] is True
    place(path, compress(TEXT[::-1]))
    assert load_error("text8", tmp_path).startswith(f"{path} holds a text of MD5")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no zip"])
def test_damaged_zip_is_reported(tmp_path, small, zipped, damage, load_error):
    flipped = bytearray(zipped)
    flipped[100] ^= 1
    content = {"truncated": zipped[:-1], "flipped": bytes(flipped), "no zip": b"<html>"}[damage]
    path = place(tmp_path / "text8" / "text8.zip", content)
    message = load_error("text8", tmp_path)
    assert message.startswith(f"{path} is damaged: {len(content)} bytes")
    assert "fetch it again from http://mattmahoney.net/dc/text8.zip" in message


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("text8", TEXT[:-1], "holds 4999 characters instead of 5000"),
        ("text8", TEXT[::-1], "holds a text of MD5 "),
        ("text8", TEXT[:-1] + b"\n", r"holds b'\n', and text8 only the letters"),
        ("text8_first_8.gz", compress(TEXT[:9]), "holds 9 characters instead of 8"),
        ("text8_first_8.gz", compress(b"anarchY "), "holds b'Y', and text8 only the letters"),
        ("text8_first_8.gz", compress(TEXT[:8])[:-9], "cannot be unpacked (Compressed file "),
        ("text8_first_8.gz", TEXT[:8], "cannot be unpacked (Not a gzipped file"),
        ("text8_first_8.gz", compress(TEXT[:8])[:10] + b"\xff" * 9, "cannot be unpacked (Err"),
        ("text8_first_6000.gz", compress(TEXT), "claims 6000 characters, and text8 has 5000"),
    ],
)
def test_damaged_text_is_reported(tmp_path, small, name, content, problem, load_error):
    path = place(tmp_path / name, content)
    message = load_error("text8", tmp_path)
    assert message.startswith(f"{path} {problem}")
    assert re.search(r"delete it, and place text8.zip there, from http\S+/text8.zip,", message)


def test_zip_of_another_text_is_reported(tmp_path, small, zipped, monkeypatch, load_error):
    monkeypatch.setattr(text8, "MD5", "0" * 32)
    path = place(tmp_path / "text8.zip", zipped)
    assert load_error("text8", tmp_path).startswith(f"{path} holds a text of MD5")


def test_downloaded_zip_is_read(tmp_path, small, zipped, host):
    (tmp_path / "work").mkdir()
    host[text8.ZIP.urls[1]] = zipped
    arrays, info, source = text8.prepare(tmp_path, tmp_path / "work")
    np.testing.assert_array_equal(arrays["text"], SYMBOLS)
    assert info["complete"]
    assert source["files"][0]["downloaded_from"] == text8.ZIP.urls[1]


def test_real_prefix_holds_the_original_characters(data_dir, tmp_path):
    folder = data_dir / "text8"
    path = max(folder.glob("text8_first_*.gz"), default=None)
    if path is None or (folder / "text8.zip").exists() or (folder / "text8").exists():
        pytest.skip(f"needs a prefix of text8 in {folder}, and not all of it")
    arrays, info, source = text8.prepare(data_dir, tmp_path)
    assert not info["complete"] and source["text"]["file"] == path.name
    with gzip.open(path) as file:
        text = np.frombuffer(file.read(), np.uint8)
    assert f"text8_first_{len(text)}.gz" == path.name
    expected = np.where(text == ord(" "), 0, text - (ord("a") - 1))
    np.testing.assert_array_equal(arrays["text"], expected)
    assert arrays["text"].max() == 26 and arrays["text"].min() == 0
    assert text[:41].tobytes() == b" anarchism originated as a term of abuse "
