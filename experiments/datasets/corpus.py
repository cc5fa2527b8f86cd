"""Text for language models: characters as symbols, split for training, validation and test."""

import dataclasses
import hashlib
import itertools
import json
import numbers
import sys
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np

from experiments import datasets
from experiments.datasets.prepared import folder_of
from experiments.runtime import paths
from experiments.runtime.errors import UserError, unknown_name

UNKNOWN = "\ufffd"  # stands for characters of validation and test text that training text lacks
SPLITS = ("train", "valid", "test")
DATASETS = ("ptb", "text8", "text")
TEXT8_SPLIT = (90_000_000, 5_000_000, 5_000_000)  # of the paper

T = TypeVar("T", str, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A split text in memory.

    Attributes:
        name: Of the data, as results carry it; it tells any split but the usual one.
        vocabulary: Symbol i is the character `vocabulary[i]`.
        splits: `train`, `valid` and `test` as symbols [N], of the smallest unsigned type that
            holds them.
        digest: SHA-256 over vocabulary and splits.
    """

    name: str
    vocabulary: str
    splits: dict[str, np.ndarray]
    digest: str


def load(dataset: str, data_dir: str, text_file: str, split: tuple[float, ...]) -> Corpus:
    """Loads a text and splits it.

    Args:
        dataset: `ptb`, which comes split; `text8`; or `text`, any text file.
        data_dir: Folder of prepared data and original files, for `ptb` and `text8`.
        text_file: Path of a UTF-8 file, for `text`.
        split: Sizes of training, validation and test text, which follow each other from the start
            of the text. For `text8` numbers of characters, for `text` these or fractions.

    Raises:
        UserError: If an argument is not as above, the text is too short for the split, or the
            text cannot be had.
    """
    if dataset not in DATASETS:
        raise UserError(unknown_name("config.dataset", dataset, DATASETS))
    if dataset == "text":
        return _text(text_file, split)
    if text_file:
        raise UserError(
            f"config.text_file is {text_file}, and config.dataset is {dataset}: "
            "to read the file, set config.dataset to text"
        )
    return _ptb(data_dir, split) if dataset == "ptb" else _text8(data_dir, split)


def encode(text: str, vocabulary: str) -> np.ndarray:
    """The symbols of a text [N], of the smallest unsigned type that holds the vocabulary.

    Args:
        text: Any text.
        vocabulary: Distinct characters. Where `UNKNOWN` is among them, it stands for those that
            are not.

    Raises:
        ValueError: If the text has other characters and the vocabulary no `UNKNOWN`.
    """
    codes = _codes(text)
    table = np.zeros(sys.maxunicode + 1, np.min_scalar_type(max(len(vocabulary) - 1, 0)))
    known = np.zeros(len(table), bool)
    symbols = _codes(vocabulary)
    table[symbols] = np.arange(len(symbols))
    known[symbols] = True
    if UNKNOWN in vocabulary:
        table[~known] = vocabulary.index(UNKNOWN)
    elif not (is_known := known[codes]).all():
        strange = "".join(dict.fromkeys(text[i] for i in np.flatnonzero(~is_known)[:10]))
        raise ValueError(f"the vocabulary lacks the characters {strange!r}")
    return table[codes]


def _codes(text: str) -> np.ndarray:
    """The code points of a text."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _corpus(name: str, vocabulary: str, splits: dict[str, np.ndarray]) -> Corpus:
    values = {split: hashlib.sha256(symbols).hexdigest() for split, symbols in splits.items()}
    digest = hashlib.sha256(json.dumps([vocabulary, values]).encode()).hexdigest()
    return Corpus(name, vocabulary, splits, digest)


def _ptb(data_dir: str, split: tuple[float, ...]) -> Corpus:
    if split:
        raise UserError(
            f"config.split is {_flag(split)}, and ptb comes split: "
            "leave it empty, --config.split='()'"
        )
    data = datasets.load("ptb", data_dir)
    return _corpus("ptb", data.info["vocabulary"], {name: data.arrays[name] for name in SPLITS})


def _text8(data_dir: str, split: tuple[float, ...]) -> Corpus:
    sizes = _sizes(split)
    if sizes is None:
        _refuse(split, "three whole numbers of characters, for training, validation and test")
    data = datasets.load("text8", data_dir)
    text, complete = data.arrays["text"], data.info["complete"]
    if sum(sizes) > len(text):
        train = len(text) - sum(sizes[1:])
        raise UserError(
            f"config.split is {_flag(split)}, {sum(sizes):,} characters in all, and there are "
            f"{len(text):,}, {'the whole' if complete else 'a prefix'} of text8: "
            + (f"use --config.split={_flag((train, *sizes[1:]))}" if train > 0 else "ask for less")
            + ("" if complete else f", or delete {folder_of('text8', data_dir)} to prepare it anew")
        )
    name = "text8"
    if sizes != TEXT8_SPLIT:  # which only the complete text is long enough for
        name = f"text8{' prefix' if sum(sizes) < sum(TEXT8_SPLIT) else ''} {_told(sizes)}"
    return _corpus(name, data.info["vocabulary"], _cut(text, sizes))


def _text(text_file: str, split: tuple[float, ...]) -> Corpus:
    fractions, sizes = _fractions(split), _sizes(split)
    if fractions is None and sizes is None:
        _refuse(
            split,
            "three fractions above 0 that sum to at most 1, or three whole numbers of characters",
        )
    text = _read(text_file)
    if fractions:
        # Rounding the points between the splits, not their sizes, loses and doubles nothing.
        points = [round(end * len(text)) for end in itertools.accumulate(fractions)]
        sizes = (points[0], points[1] - points[0], points[2] - points[1])
    if min(sizes) < 1 or sum(sizes) > len(text):
        raise UserError(
            f"config.text_file is {text_file}, whose {len(text):,} characters are too few for "
            f"config.split, {_flag(split)}: ask for less or take a longer text"
        )
    parts = _cut(text, sizes)
    seen = np.zeros(sys.maxunicode + 1, bool)
    seen[_codes(parts["train"])] = True
    vocabulary = "".join(map(chr, np.flatnonzero(seen)))
    if UNKNOWN not in vocabulary:
        vocabulary += UNKNOWN
    splits = {name: encode(part, vocabulary) for name, part in parts.items()}
    return _corpus(f"{Path(text_file).name} {_told(sizes)}", vocabulary, splits)


def _read(text_file: str) -> str:
    if not text_file:
        raise UserError("config.text_file is empty: give the path of a UTF-8 text file")
    try:
        data = Path(paths.expand("config.text_file", text_file)).read_bytes()
    except OSError as error:
        raise UserError(
            f"config.text_file is {text_file}, which cannot be read: {error.strerror}"
        ) from error
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # the byte order mark
    except UnicodeDecodeError as error:
        raise UserError(
            f"config.text_file is {text_file}, which is not UTF-8: byte {error.start} is "
            f"{data[error.start]:#04x}; convert the file, for example with iconv"
        ) from error
    if "\0" in text:
        raise UserError(
            f"config.text_file is {text_file}, which holds NUL characters, as UTF-16 does: convert "
            "the file to UTF-8, for example with iconv"
        )
    if not text:
        raise UserError(f"config.text_file is {text_file}, which holds no text")
    return text


def _numbers(split: tuple[float, ...]) -> bool:
    return len(split) == len(SPLITS) and all(
        isinstance(size, numbers.Real) and not isinstance(size, bool) for size in split
    )


def _sizes(split: tuple[float, ...]) -> tuple[int, ...] | None:
    """The numbers of characters, if the split consists of three."""
    if _numbers(split) and all(size >= 1 and float(size).is_integer() for size in split):
        return tuple(map(int, split))
    return None


def _fractions(split: tuple[float, ...]) -> tuple[float, ...] | None:
    """The fractions, if the split consists of three."""
    if _numbers(split) and all(size > 0 for size in split) and sum(split) < 1 + 1e-12:
        return tuple(split)
    return None


def _refuse(split: tuple[float, ...], allowed: str) -> NoReturn:
    raise UserError(f"config.split is {_flag(split) or 'empty'}: it must be {allowed}")


def _cut(text: T, sizes: tuple[int, ...]) -> dict[str, T]:
    """Consecutive parts of a text, by name of the split."""
    ends = list(itertools.accumulate(sizes))
    return {
        name: text[end - size : end] for name, size, end in zip(SPLITS, sizes, ends, strict=True)
    }


def _flag(split: tuple[float, ...]) -> str:
    """A split as the command line takes it."""
    return ",".join(map(str, split))


def _told(sizes: tuple[int, ...]) -> str:
    return f"({' / '.join(f'{size:,}' for size in sizes)} characters)"
