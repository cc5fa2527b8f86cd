import codecs
import dataclasses
import random

import numpy as np
import pytest

from experiments.datasets import corpus, prepared
from experiments.datasets.corpus import UNKNOWN
from experiments.runtime.errors import UserError

LETTERS = " abcdefghijklmnopqrstuvwxyz"


def error(dataset="text", data_dir="data", text_file="", split=(0.8, 0.1, 0.1)) -> str:
    with pytest.raises(UserError) as caught:
        corpus.check(dataset, str(text_file), split)
        corpus.load(dataset, str(data_dir), str(text_file), split)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def book(tmp_path):
    """Writes the text file `book.txt`."""

    def write(content: str | bytes):
        path = tmp_path / "book.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read(path, *split: float) -> corpus.Corpus:
    return corpus.load("text", "data", str(path), split)


def decoded(data: corpus.Corpus, split: str) -> str:
    return "".join(data.vocabulary[symbol] for symbol in data.splits[split])


def prepare_text8(data_dir, size: int, complete: bool) -> np.ndarray:
    text = np.random.default_rng(0).integers(0, 27, size).astype(np.uint8)
    folder = prepared.folder_of("text8", str(data_dir))
    prepared.write(folder, {"text": text}, {"vocabulary": LETTERS, "complete": complete}, {})
    return text


def test_unknown_dataset_suggests_the_closest_name():
    message = error(dataset="text88")
    assert message.startswith("config.dataset is 'text88'") and "did you mean text8?" in message


# Penn Treebank


@pytest.fixture
def ptb(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        split: random.integers(0, 3, size).astype(np.uint8)
        for split, size in {"train": 30, "valid": 20, "test": 10}.items()
    }
    folder = prepared.folder_of("ptb", str(tmp_path))
    prepared.write(folder, arrays, {"vocabulary": "\nab"}, {})
    return arrays


def test_ptb_has_predefined_splits(tmp_path, ptb):
    data = corpus.load("ptb", str(tmp_path), "", ())
    assert (data.name, data.vocabulary) == ("ptb", "\nab")
    assert list(data.splits) == ["train", "valid", "test"]
    for split, symbols in data.splits.items():
        np.testing.assert_array_equal(symbols, ptb[split])


def test_split_or_text_file_with_ptb_raises(tmp_path, ptb):
    message = error("ptb", tmp_path, split=(0.8, 0.1, 0.1))
    assert message.startswith("config.split is 0.8,0.1,0.1: it must be empty for ptb")
    message = error("ptb", tmp_path, text_file="book.txt", split=())
    assert message.startswith("config.text_file is book.txt, and config.dataset is ptb")


# text8


@pytest.fixture
def small_paper_split(monkeypatch):
    monkeypatch.setattr(corpus, "TEXT8_SPLIT", (90, 5, 5))


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ((90, 5, 5), "text8"),
        ((80, 10, 10), "text8 (80 / 10 / 10 characters)"),
        ((60, 5, 5), "text8 prefix (60 / 5 / 5 characters)"),
    ],
)
def test_text8_splits_start_at_the_beginning(tmp_path, small_paper_split, split, name):
    text = prepare_text8(tmp_path, 100, complete=True)
    data = corpus.load("text8", str(tmp_path), "", split)
    assert (data.name, data.vocabulary) == (name, LETTERS)
    assert list(data.splits) == ["train", "valid", "test"]
    assert tuple(map(len, data.splits.values())) == split
    np.testing.assert_array_equal(np.concatenate([*data.splits.values()]), text[: sum(split)])


def test_text8_prefix_is_named_as_a_prefix(tmp_path):
    prepare_text8(tmp_path, 12_000, complete=False)
    data = corpus.load("text8", str(tmp_path), "", (10_000, 1_000, 1_000))
    assert data.name == "text8 prefix (10,000 / 1,000 / 1,000 characters)"


@pytest.mark.parametrize("complete", [False, True])
def test_text8_too_short_for_the_split_raises(tmp_path, complete):
    prepare_text8(tmp_path, 12_000, complete)
    message = error("text8", tmp_path, split=(90_000, 5_000, 5_000))
    assert message.startswith("config.split is 90000,5000,5000") and "12,000" in message
    assert ("prefix of text8" in message) != complete
    assert ("place text8.zip in" in message) != complete


# Text files


@pytest.mark.parametrize("length", [20, 37, 999, 1000])
@pytest.mark.parametrize(
    "split", [(0.9, 0.05, 0.05), (0.56, 0.34, 0.1), (0.34, 0.33, 0.33), (1 / 3, 1 / 3, 1 / 3)]
)
def test_fractional_splits_cover_the_text(book, split, length):
    text = "abc" + "".join(random.Random(0).choices("abc", k=length - 3))
    data = read(book(text), *split)
    assert "".join(decoded(data, part) for part in ("train", "valid", "test")) == text
    for part, fraction in zip(data.splits.values(), split, strict=True):
        assert abs(len(part) - fraction * length) < 1


def test_splits_by_character_count_start_at_the_beginning(book):
    data = read(book("abcdefghij"), 4, 3.0, 2)
    assert decoded(data, "train") == "abcd"
    assert {len(symbols) for symbols in data.splits.values()} == {4, 3, 2}
    assert data.name == "book.txt (4 / 3 / 2 characters)"
    assert read(book("ab" * 5000), 0.5, 0.2, 0.1).name == (
        "book.txt (5,000 / 2,000 / 1,000 characters)"
    )


def test_vocabulary_is_built_from_the_training_text(book):
    data = read(book("cabba" + "dab" + "xyz"), 5, 3, 3)
    assert data.vocabulary == "abc" + UNKNOWN
    assert decoded(data, "valid") == UNKNOWN + "ab"
    assert decoded(data, "test") == 3 * UNKNOWN
    assert all(symbols.dtype == np.uint8 for symbols in data.splits.values())


def test_training_text_may_contain_the_unknown_character(book):
    data = read(book(f"a{UNKNOWN}\U0001f600" + "ab" + "a"), 3, 2, 1)
    assert data.vocabulary == f"a{UNKNOWN}\U0001f600"
    assert data.splits["valid"].tolist() == [0, 1]


def test_decoding_keeps_newlines_and_unicode_unchanged(book):
    text = "\ufeffa\r\nb\n\n\U0001f600\u00e9e\u0301\u2028"
    data = read(book(codecs.BOM_UTF8 + text.encode() * 3), *(3 * [len(text)]))
    for split in data.splits:
        assert decoded(data, split) == text
    assert data.vocabulary == "".join(sorted(set(text))) + UNKNOWN


@pytest.mark.parametrize(
    ("characters", "dtype"),
    [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)],
)
def test_symbols_use_the_smallest_dtype(book, characters, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + characters)))
    data = read(book(text + text[:2] + "\u00e9"), characters, 2, 1)
    assert len(data.vocabulary) == characters + 1
    assert {symbols.dtype for symbols in data.splits.values()} == {np.dtype(dtype)}
    assert decoded(data, "train") == text
    assert data.splits["test"].tolist() == [characters]


def test_digest_depends_on_vocabulary_and_splits(book):
    texts = ["abab" + "ab" + "ba", "abab" + "ab" + "bb", "acac" + "ac" + "ca"]
    digests = [read(book(text), 4, 2, 2).digest for text in texts]
    digests.append(read(book(texts[0]), 4, 3, 1).digest)
    assert len(set(digests)) == 4
    again = read(book(texts[0]), 4, 2, 2)
    assert again.digest == digests[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.name = "other"


def test_unreadable_or_empty_text_file_raises(tmp_path, book):
    assert error(text_file="").startswith("config.text_file is empty: it must be the path")
    for path, problem in [(tmp_path / "no.txt", "No such file"), (tmp_path, "Is a directory")]:
        message = error(text_file=path)
        assert message.startswith(f"config.text_file is {path}, which cannot be read: {problem}")
    for content in (b"", codecs.BOM_UTF8):
        path = book(content)
        assert error(text_file=path) == f"config.text_file is {path}, which holds no text"
    message = error(text_file="~nobody-of-this-name/book.txt")
    assert message.startswith("config.text_file=~nobody-of-this-name/book.txt: there is no user")


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_non_utf8_text_file_raises(book, mark):
    path = book(mark + b"caf\xe9 and more")
    message = error(text_file=path)
    assert message.startswith(f"config.text_file is {path}, which is not UTF-8")
    assert f"byte {len(mark) + 3} is 0xe9" in message


@pytest.mark.parametrize("split", [(8, 2, 1), (11, 1, 1), (0.9, 0.05, 0.05), (0.01, 0.5, 0.4)])
def test_text_too_short_for_the_split_raises(book, split):
    path = book("abcdefghij")
    message = error(text_file=path, split=split)
    assert message.startswith(f"config.split is {','.join(map(str, split))}")
    assert f"{path}, has 10 characters" in message


@pytest.mark.parametrize(
    "split",
    [
        (),
        (0.5, 0.5),
        (0.9, 0.1, 0.1),
        (0.9, 0.1, 0.0),
        (1.1, -0.2, 0.1),
        (8, 1, 0),
        (-8, 1, 1),
        (8, 1, 0.5),
        (float("nan"), 0.1, 0.1),
        (float("inf"), 1, 1),
        ("0.8", "0.1", "0.1"),
        (True, True, True),
    ],
)
def test_invalid_splits_raise(book, split):
    message = error(text_file=book("abcdefghij"), split=split)
    assert message.startswith("config.split is ") and "three fractions" in message
    assert message.startswith("config.split is empty") == (split == ())


def test_encode_maps_characters_to_symbols():
    assert corpus.encode("cab", "abc").tolist() == [2, 0, 1]
    assert corpus.encode("cab", "abc").dtype == np.uint8
    assert corpus.encode("", "abc").tolist() == []
    assert corpus.encode("a\U0001f600", f"{UNKNOWN}a").tolist() == [1, 0]
    with pytest.raises(ValueError, match="lacks the characters 'x!'"):
        corpus.encode("axbx!", "abc")


def test_text_with_nul_characters_raises(book):
    message = error(text_file=book("plain".encode("utf-16-le")))
    assert "NUL characters" in message
