"""Text for language models: characters as symbols, split for training, validation and test."""

import dataclasses
import hashlib
import itertools
import json
import numbers
import sys
from pathlib import Path
from typing import TypeVar

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
      name: name of the data in results, with the split unless it is the paper's.
      vocabulary: symbol i is the character `vocabulary[i]`.
      splits: `train`, `valid` and `test` as symbols [N], of the smallest unsigned type that
        holds them.
      digest: SHA-256 over vocabulary and splits.
      unknown: by split, the share of characters that the training text lacks.
    """

    name: str
    vocabulary: str
    splits: dict[str, np.ndarray]
    digest: str
    unknown: dict[str, float]


def check(dataset: str, text_file: str, split: tuple[float, ...]) -> None:
    """Refuses arguments of `load` that are invalid whatever the data.

    Raises:
      UserError: names the config field and what it may be.
    """
    if dataset not in DATASETS:
        raise UserError(unknown_name("config.dataset", dataset, DATASETS))
    if dataset == "text" and not text_file:
        raise UserError("config.text_file is empty: it must be the path of a UTF-8 text file")
    if dataset != "text" and text_file:
        raise UserError(
            f"config.text_file is {text_file}, and config.dataset is {dataset}: "
            "to read the file, set config.dataset to text"
        )
    if dataset == "ptb":
        if split:
            raise UserError(
                f"config.split is {_flag(split)}: it must be empty for ptb, which has fixed "
                "splits; use --config.split='()'"
            )
        return
    is_number = [isinstance(n, numbers.Real) and not isinstance(n, bool) and n > 0 for n in split]
    if not (
        len(split) == len(SPLITS)
        and all(is_number)
        and (_are_fractions(split) or all(float(n).is_integer() for n in split))
    ):
        raise UserError(
            f"config.split is {_flag(split) or 'empty'}: it must be three whole numbers of "
            "characters, or three fractions above 0 that sum to at most 1"
        )


def load(dataset: str, data_dir: str, text_file: str, split: tuple[float, ...]) -> Corpus:
    """Loads a text and splits it. Call `check` before.

    Args:
      dataset: `ptb`, which comes split; `text8`; or `text`, any text file.
      data_dir: folder of prepared data and original files, for `ptb` and `text8`.
      text_file: path of a UTF-8 file, for `text`.
      split: sizes of training, validation and test text, which follow each other from the start
        of `text8` or `text`: numbers of characters, or fractions. Empty for `ptb`.

    Raises:
      UserError: the text is too short for the split, or cannot be loaded.
    """
    if dataset == "text":
        return _text(text_file, split)
    return _ptb(data_dir) if dataset == "ptb" else _text8(data_dir, split)


def encode(text: str, vocabulary: str) -> np.ndarray:
    """The symbols of a text [N], of the smallest unsigned type that holds the vocabulary.

    Args:
      text: any text.
      vocabulary: distinct characters. If `UNKNOWN` is among them, it stands for all others.

    Raises:
      ValueError: if the text has other characters and the vocabulary no `UNKNOWN`.
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


def _corpus(
    name: str, vocabulary: str, splits: dict[str, np.ndarray], unknown: dict[str, float]
) -> Corpus:
    values = {split: hashlib.sha256(symbols).hexdigest() for split, symbols in splits.items()}
    digest = hashlib.sha256(json.dumps([vocabulary, values]).encode()).hexdigest()
    return Corpus(name, vocabulary, splits, digest, unknown)


def _ptb(data_dir: str) -> Corpus:
    data = datasets.load("ptb", data_dir)
    splits = {name: data.arrays[name] for name in SPLITS}
    return _corpus("ptb", data.info["vocabulary"], splits, unknown={})


def _text8(data_dir: str, split: tuple[float, ...]) -> Corpus:
    data = datasets.load("text8", data_dir)
    text, complete = data.arrays["text"], data.info["complete"]
    folder = folder_of("text8", data_dir)
    place = folder.parents[1] / "text8"
    hint = "" if complete else f"; for the whole text, place text8.zip in {place}, delete {folder}"
    sizes = _sizes(split, len(text), "text8" if complete else "the prefix of text8", hint)
    name = "text8"
    if sizes != TEXT8_SPLIT:  # only the complete text is long enough for it
        name = f"text8{' prefix' if sum(sizes) < sum(TEXT8_SPLIT) else ''} {_described(sizes)}"
    return _corpus(name, data.info["vocabulary"], _cut(text, sizes), unknown={})


def _text(text_file: str, split: tuple[float, ...]) -> Corpus:
    text = _read(text_file)
    sizes = _sizes(split, len(text), f"config.text_file, {text_file},")
    parts = _cut(text, sizes)
    seen = np.zeros(sys.maxunicode + 1, bool)
    seen[_codes(parts["train"])] = True
    vocabulary = "".join(map(chr, np.flatnonzero(seen)))
    if UNKNOWN not in vocabulary:
        vocabulary += UNKNOWN
    splits = {name: encode(part, vocabulary) for name, part in parts.items()}
    unknown = {name: float(np.mean(~seen[_codes(part)])) for name, part in parts.items()}
    return _corpus(f"{Path(text_file).name} {_described(sizes)}", vocabulary, splits, unknown)


def _read(text_file: str) -> str:
    try:
        data = Path(paths.expand("config.text_file", text_file)).read_bytes()
        text = data.decode("utf-8").removeprefix("\ufeff")  # the byte order mark
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        problem = (
            f"is not UTF-8: byte {error.start} is {data[error.start]:#04x}; convert the file, "
            "for example with iconv"
        )
    else:
        if "\0" in text:
            problem = "holds NUL characters, as UTF-16 does: convert the file to UTF-8"
        elif not text:
            problem = "holds no text"
        else:
            return text
    raise UserError(f"config.text_file is {text_file}, which {problem}")


def _are_fractions(split: tuple[float, ...]) -> bool:
    return sum(split) < 1 + 1e-12


def _sizes(split: tuple[float, ...], length: int, source: str, hint: str = "") -> tuple[int, ...]:
    """The numbers of characters that a split takes from a text of `length` characters."""
    sizes = tuple(map(int, split))
    if _are_fractions(split):
        # Rounds the boundaries of splits, not their sizes: this loses and repeats no character.
        points = [0, *(round(end * length) for end in itertools.accumulate(split))]
        sizes = tuple(end - start for start, end in itertools.pairwise(points))
    if min(sizes) < 1 or sum(sizes) > length:
        raise UserError(
            f"config.split is {_flag(split)}, and {source} has {length:,} characters: each split "
            f"must have at least 1, all together at most {length:,}{hint}"
        )
    return sizes


def _cut(text: T, sizes: tuple[int, ...]) -> dict[str, T]:
    """Consecutive parts of a text, by name of the split."""
    ends = itertools.accumulate(sizes)
    return {
        name: text[end - size : end] for name, size, end in zip(SPLITS, sizes, ends, strict=True)
    }


def _flag(split: tuple[float, ...]) -> str:
    """A split as the command line takes it."""
    return ",".join(map(str, split))


def _described(sizes: tuple[int, ...]) -> str:
    return f"({' / '.join(f'{size:,}' for size in sizes)} characters)"
