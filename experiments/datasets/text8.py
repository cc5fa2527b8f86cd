"""text8: the first 100 MB of Wikipedia's text as lower-case letters and spaces.

If only a prefix of the text is available, it can be prepared instead.
"""

import gzip
import hashlib
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import examples
from experiments.datasets.originals import Original, Originals, matching
from experiments.datasets.prepared import Made
from experiments.runtime.errors import UserError

MXNET = "https://apache-mxnet.s3-accelerate.dualstack.amazonaws.com/gluon/dataset"
ZIP = Original(
    "text8.zip",
    31_344_016,
    "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    (
        "http://mattmahoney.net/dc/text8.zip",
        f"{MXNET}/large_text_compression_benchmark/text8-6c70299b.zip",
        "https://data.deepai.org/text8.zip",
    ),
)
ORIGINALS = Originals("text8", "text8", (ZIP,))
SIZE, MD5 = 100_000_000, "3bea1919949baf155f99411df5fada7e"  # of the unpacked text
VOCABULARY = " abcdefghijklmnopqrstuvwxyz"
PREFIX = re.compile(r"text8_first_([1-9][0-9]*)\.gz")
BLOCK = 1_000_000  # characters of an example; TFDS is slow with one example of 100 MB
FEATURES = {"text": tfds.features.Text()}


def prepare(source_dir: Path, work_dir: Path) -> Made:
    """Makes the array from the original file, downloading it if it is missing.

    Args:
      source_dir: folder that may have the text, directly or in its subfolder `text8`, in order of
        preference: the original `text8.zip`; the unpacked file `text8`; the first N characters,
        gzipped, as `text8_first_<N>.gz`.
      work_dir: folder for downloads.

    Returns:
      The array `text` uint8 [N] of symbols, N being 100,000,000 or the prefix's; the
      metadata: symbol i is the i-th character of `vocabulary`, and whether the text is
      `complete`; the source.

    Raises:
      UserError: if the file is damaged, or there is none and it cannot be downloaded.
    """
    path, files = _unpacked(source_dir), []
    if not path:
        paths, files = ORIGINALS.get(source_dir, work_dir)
        path = paths[ZIP.name]
    text = read_text(path)
    source = {"files": files, "text": _described(path, text), "packages": examples.PACKAGES}
    blocks = ({"text": text[start : start + BLOCK]} for start in range(0, len(text), BLOCK))
    rows = examples.read(FEATURES, {"text": blocks}, work_dir)["text"]
    symbols = VOCABULARY.encode("ascii")
    table = bytes.maketrans(symbols, bytes(range(len(symbols))))
    array = np.frombuffer(b"".join(row["text"] for row in rows).translate(table), np.uint8)
    return {"text": array}, {"vocabulary": VOCABULARY, "complete": len(array) == SIZE}, source


def read_text(path: Path) -> bytes:
    """Reads the text from a file of any of the three kinds.

    Raises:
      UserError: if it cannot be unpacked.
    """
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return archive.read("text8")
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"cannot be unpacked ({error})") from error


def _unpacked(source_dir: Path) -> Path | None:
    """The unpacked text or its longest prefix; None if there is neither, or the original exists."""
    folders = (source_dir, source_dir / ORIGINALS.name)
    if any((folder / ZIP.name).is_file() for folder in folders):
        return None
    for folder in folders:
        if (folder / "text8").is_file():  # in `source_dir`, `text8` may be the subfolder
            return folder / "text8"
    files = [path for folder in folders for path in matching(folder, "text8_first_*.gz")]
    prefixes = [path for path in files if PREFIX.fullmatch(path.name)]
    return max(prefixes, key=_expected_size, default=None)


def _expected_size(path: Path) -> int:
    prefix = PREFIX.fullmatch(path.name)
    return int(prefix[1]) if prefix else SIZE


def _described(path: Path, text: bytes) -> dict[str, Any]:
    """A text's entry for the manifest; raises a `UserError` if it is no text8 or prefix of it."""
    expected, md5 = _expected_size(path), hashlib.md5(text).hexdigest()
    if expected > SIZE:
        raise _damaged(path, f"claims {expected} characters, and text8 has {SIZE}")
    if len(text) != expected:
        raise _damaged(path, f"holds {len(text)} characters instead of {expected}")
    if strange := text.translate(None, VOCABULARY.encode("ascii")):
        raise _damaged(path, f"holds {strange[:1]!r}, and text8 only the letters a to z and spaces")
    if len(text) == SIZE and md5 != MD5:
        raise _damaged(path, f"holds a text of MD5 {md5[:12]} instead of {MD5[:12]}")
    return {"file": path.name, "characters": len(text), "md5": md5}


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} {problem}: delete it, and place {ZIP.name} there, from {ZIP.urls[0]}, or let it "
        "be downloaded"
    )
