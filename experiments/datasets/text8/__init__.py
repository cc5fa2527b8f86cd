"""text8: the first 100 MB of Wikipedia's text as lower-case letters and spaces, through TFDS.

Where only the beginning of the text is at hand, that prefix can be prepared instead.
"""

import dataclasses
import gzip
import hashlib
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets.originals import Originals, examples, matching
from experiments.datasets.prepared import Made
from experiments.runtime.errors import UserError

ORIGINALS = Originals.beside(__file__, "text8")
SIZE, MD5 = 100_000_000, "3bea1919949baf155f99411df5fada7e"  # of the unpacked text
VOCABULARY = " abcdefghijklmnopqrstuvwxyz"
PREFIX = re.compile(r"text8_first_([1-9][0-9]*)\.gz")


def prepare(source_dir: Path) -> Made:
    """Makes the array from the original file, downloading it if it is not at hand.

    Args:
        source_dir: Folder in which, or in whose subfolder `text8`, are looked for, in this order:
            the original `text8.zip`; the unpacked file `text8`; the first N characters, gzipped,
            as `text8_first_<N>.gz`.

    Returns:
        The array `text` uint8 [N] of symbols, N being 100,000,000 or that of the prefix; the
        metadata: symbol i is the i-th character of `vocabulary`, and whether the text is
        `complete`; the source.

    Raises:
        UserError: If the file at hand is damaged, if there is none and it cannot be downloaded,
            or if TensorFlow Datasets is not installed.
    """
    local = _local_text(source_dir)
    if local:  # what is wrong with it is said before TFDS works on it
        _check(local, _unpacked(local))
    originals = dataclasses.replace(ORIGINALS, files=()) if local else ORIGINALS

    def text8_blocks(paths: dict[str, Path], data_dir: Path) -> Any:
        from experiments.datasets.text8.builder import Text8Blocks

        return Text8Blocks(text_path=local or paths["text8.zip"], data_dir=data_dir)

    with originals.built(source_dir, text8_blocks) as (builder, source):
        text = b"".join(block["text"] for block in examples(builder, "text"))
    path = builder.text_path
    source["text"] = {"file": path.name, "characters": len(text), "md5": _check(path, text)}
    symbols = VOCABULARY.encode("ascii")
    table = bytes.maketrans(symbols, bytes(range(len(symbols))))
    arrays = {"text": np.frombuffer(text.translate(table), np.uint8)}
    return arrays, {"vocabulary": VOCABULARY, "complete": len(text) == SIZE}, source


def read_text(path: Path) -> bytes:
    """Reads the text from a file of any of the three kinds."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return archive.read("text8")
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    return path.read_bytes()


def _local_text(source_dir: Path) -> Path | None:
    """The unpacked text or its longest prefix, if one is at hand and the original is not."""
    folders = (source_dir, source_dir / ORIGINALS.name)
    if any((folder / file.name).is_file() for folder in folders for file in ORIGINALS.files):
        return None
    for folder in folders:
        if (folder / "text8").is_file():  # in `source_dir` it may as well be the subfolder
            return folder / "text8"
    prefixes = [
        path
        for folder in folders
        for path in matching(folder, "text8_first_*.gz")
        if PREFIX.fullmatch(path.name)
    ]
    return max(prefixes, key=_expected_size, default=None)


def _expected_size(path: Path) -> int:
    prefix = PREFIX.fullmatch(path.name)
    return int(prefix[1]) if prefix else SIZE


def _unpacked(path: Path) -> bytes:
    """Reads the text, and raises a `UserError` if its file cannot be unpacked."""
    try:
        return read_text(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"cannot be unpacked ({error})") from error


def _check(path: Path, text: bytes) -> str:
    """The MD5 of a text; raises a `UserError` if it is neither text8 nor a possible prefix."""
    expected, md5 = _expected_size(path), hashlib.md5(text).hexdigest()
    if expected > SIZE:
        raise _damaged(path, f"claims {expected} characters, and text8 has {SIZE}")
    if len(text) != expected:
        raise _damaged(path, f"holds {len(text)} characters instead of {expected}")
    if strange := text.translate(None, VOCABULARY.encode("ascii")):
        raise _damaged(path, f"holds {strange[:1]!r}, and text8 only the letters a to z and spaces")
    if len(text) == SIZE and md5 != MD5:
        raise _damaged(path, f"holds a text of MD5 {md5[:12]} instead of {MD5[:12]}")
    return md5


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} {problem}: delete it, and place text8.zip there, from "
        f"{ORIGINALS.files[0].urls[0]}, or let it be downloaded"
    )
