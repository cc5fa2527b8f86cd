import functools
import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets import cnn, load, prepared
from scripts.prepare_data import described

FOLDERS = {"train": "training", "valid": "validation", "test": "test"}
COUNTS = {"train": 650, "valid": 34, "test": 35}
MANUAL = "by hand from https://cs.nyu.edu/~kcho/DMQA/"


def item(data: prepared.Dataset, name: str, ends: str, index: int) -> list[str]:
    """An entry of an array: its words, or its lines if the array holds bytes."""
    ends = data.arrays[ends]
    values = data.arrays[name][ends[index - 1] if index else 0 : ends[index]]
    if values.dtype == np.uint8:
        return values.tobytes().decode().split("\n")
    words = vocabulary(data)
    return [words[value] for value in values]


def vocabulary(data: prepared.Dataset) -> list[str]:
    return lines_of(data.arrays["vocabulary"].tobytes())


@functools.cache
def lines_of(text: bytes) -> list[str]:
    return text.decode().split("\n")


def names(data: prepared.Dataset, split: str) -> list[str]:
    entries = range(data.info["counts"][split])
    return [item(data, f"{split}_names", f"{split}_name_ends", i)[0] for i in entries]


@pytest.fixture
def failure(load_error):
    return functools.partial(load_error, "cnn")


# The sample of real questions


@pytest.fixture(scope="module")
def archive(data_dir):
    path = data_dir / "cnn" / "cnn_sample.tgz"
    if not path.exists() or cnn.find(data_dir) != path:
        pytest.skip(f"needs {path}, and no more of CNN")
    return path


@pytest.fixture(scope="module")
def sample(archive, data_dir):
    return load("cnn", str(data_dir))


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory):
    """The sample's folder `cnn`, with other files among the questions."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")
    for name in (".DS_Store", f"._{40 * 'a'}.question", "notes.txt"):
        (folder / "cnn" / "questions" / "test" / name).write_bytes(b"no question")
    return folder / "cnn"


def test_sample_arrays_have_the_documented_format(sample):
    assert sample.info == {
        "counts": COUNTS,
        "complete": False,
        "skipped": {split: {} for split in COUNTS},
    }
    words = vocabulary(sample)
    assert words == sorted(set(words)) and "" not in words
    used = np.zeros(len(words), bool)
    for split, count in COUNTS.items():
        columns = {"passages": ("passage_ends", np.int32), "questions": ("question_ends", np.int32)}
        columns |= {"names": ("name_ends", np.uint8), "entities": ("entity_ends", np.uint8)}
        if split == "train":
            del columns["entities"]
            assert not any(name.startswith("train_entit") for name in sample.arrays)
        for name, (ends_name, dtype) in columns.items():
            array, ends = sample.arrays[f"{split}_{name}"], sample.arrays[f"{split}_{ends_name}"]
            assert array.dtype == dtype and array.ndim == 1
            assert ends.dtype == np.int64 and ends.shape == (count,) and ends[-1] == len(array)
            assert np.diff(ends, prepend=0).min() > 0
        answers = sample.arrays[f"{split}_answers"]
        assert answers.dtype == np.int32 and answers.shape == (count,)
        for array in (sample.arrays[f"{split}_passages"], sample.arrays[f"{split}_questions"]):
            used[array] = True
        assert names(sample, split) == sorted(names(sample, split))
    assert used.all()


def test_words_match_the_original_files(sample, unpacked):
    for split, folder in FOLDERS.items():
        for i, name in enumerate(names(sample, split)):
            text = (unpacked / "questions" / folder / f"{name}.question").read_text("utf-8")
            lines = text.rstrip("\n").split("\n")
            to = f"{split}_"
            passage = item(sample, f"{to}passages", f"{to}passage_ends", i)
            assert " ".join(passage) == lines[2].lower()
            assert " ".join(item(sample, f"{to}questions", f"{to}question_ends", i)) == lines[4]
            assert vocabulary(sample)[sample.arrays[f"{to}answers"][i]] == lines[6]
            if split != "train":
                assert item(sample, f"{to}entities", f"{to}entity_ends", i) == lines[8:]


def test_unpacked_sample_gives_the_same_dataset(sample, unpacked):
    again = load("cnn", str(unpacked.parent))
    assert (again.digest, again.info) == (sample.digest, sample.info)
    assert [path.name for path in (unpacked.parent / "prepared").iterdir()] == ["cnn"]


# Missing, damaged and improper files


def content(passage="@entity1 met @entity2 .", question="who met @placeholder", answer="@entity1"):
    return f"http://x\n\n{passage}\n\n{question}\n\n{answer}\n\n@entity1:A:b\n@entity2:C"


def named(text: str | bytes) -> tuple[str, bytes]:
    data = text if isinstance(text, bytes) else text.encode()
    return f"{hashlib.sha1(data).hexdigest()}.question", data


PROPER = {folder: dict([named(content())]) for folder in FOLDERS.values()}


def tgz(questions: dict[str, dict[str, bytes]]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as members:
        for folder, entries in questions.items():
            for name, data in entries.items():
                info = tarfile.TarInfo(f"./cnn/questions/{folder}/{name}")
                info.size = len(data)
                members.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def unpack(folder: Path, questions: dict[str, dict[str, bytes]]) -> Path:
    for split, entries in questions.items():
        (folder / "questions" / split).mkdir(parents=True)
        for name, data in entries.items():
            (folder / "questions" / split / name).write_bytes(data)
    return folder / "questions"


@pytest.mark.parametrize(
    "order",
    [
        ["cnn.tgz", "cnn/cnn.tgz", "questions/", "cnn/questions/", "cnn/cnn/questions/"],
        ["cnn.tgz", "cnn/cnn_sample.tgz"],
        ["cnn/questions/", "cnn_sample.tgz"],
    ],
)
def test_files_are_found_in_order_of_preference(tmp_path, order):
    (tmp_path / "questions").mkdir()  # without splits: something else
    for name in reversed(order):
        path = tmp_path / name
        if name.endswith("/"):
            (path / "training").mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        assert cnn.find(tmp_path) == path


def test_missing_files_error_says_where_to_place_them(tmp_path, failure):
    message = failure(tmp_path)
    assert message.startswith(f"CNN is not in {tmp_path}: download cnn.tgz") and MANUAL in message
    assert message.endswith(f"in {tmp_path / 'cnn'}")


def test_ambiguous_archives_raise(tmp_path, failure):
    for name in ("cnn_a.tgz", "cnn_b.tgz"):
        (tmp_path / name).touch()
    message = failure(tmp_path)
    archives = f"{tmp_path / 'cnn_a.tgz'} and {tmp_path / 'cnn_b.tgz'}"
    assert message.startswith(f"several archives match cnn*.tgz: {archives}; rename the right one")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"<html>",
        lambda data: data[:-8] + bytes(8),
        lambda data: gzip.compress(b"no tar"),
        lambda data: gzip.compress(gzip.decompress(data)[:600]),
    ],
    ids=["shorter", "empty", "page", "checksum", "no tar", "shorter tar"],
)
def test_damaged_archive_is_reported(tmp_path, damage, failure):
    path = tmp_path / "cnn" / "cnn.tgz"
    path.parent.mkdir()
    path.write_bytes(damage(tgz(PROPER)))
    message = failure(tmp_path)
    assert message.startswith(f"{path} cannot be unpacked (")
    assert "delete it, download cnn.tgz" in message and MANUAL in message


@pytest.mark.parametrize("empty", [False, True])
def test_missing_split_is_reported(tmp_path, empty, failure):
    questions = {**PROPER, "validation": {}}
    if not empty:
        del questions["validation"]
    path = unpack(tmp_path, questions)
    problem = "has no questions in its folder validation: delete"
    assert failure(tmp_path).startswith(f"{path} {problem} that folder and unpack cnn.tgz again")
    (tmp_path / "cnn.tgz").write_bytes(tgz(questions))
    assert failure(tmp_path).startswith(f"{tmp_path / 'cnn.tgz'} {problem} it, download")


def test_damaged_files_are_reported(tmp_path, failure):
    wrong = {f"{i:040x}.question": content().encode() for i in range(5)}
    path = unpack(tmp_path, {**PROPER, "test": PROPER["test"] | wrong})
    first = ", ".join(sorted(wrong)[:3])
    assert failure(tmp_path) == (
        f"{path} holds damaged files, 5 in all: {first}, ...: "
        "delete that folder and unpack cnn.tgz again"
    )


IMPROPER = {
    "missing block": [content()[:-24], "http://x", content(answer=""), ""],
    "empty passage": [content(passage="")],
    "empty question": [content(question=" ")],
    "answer that is no entity of the passage": [content(answer="met"), content(answer="@entity3")],
    "not UTF-8": [content().encode() + b"\xff"],
}


def test_invalid_questions_are_skipped_and_reported(tmp_path, caplog):
    improper = {why: dict(map(named, texts)) for why, texts in IMPROPER.items()}
    every = {name: data for entries in improper.values() for name, data in entries.items()}
    (tmp_path / "cnn_own.tgz").write_bytes(tgz({**PROPER, "training": every | PROPER["training"]}))
    data = load("cnn", str(tmp_path))
    assert data.info["counts"] == {"train": 1, "valid": 1, "test": 1}
    skipped = {why: sorted(name[:40] for name in entries) for why, entries in improper.items()}
    assert data.info["skipped"] == {"train": skipped, "valid": {}, "test": {}}
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and "10 of 380,298 train, 1 of 3,924 valid, 1 of" in warnings[0]
    for why, of_reason in skipped.items():
        assert f"{why}, {len(of_reason)} in all: {', '.join(of_reason[:3])}" in warnings[1]


def test_questions_are_sorted_by_name(tmp_path):
    texts = dict(named(content(question=f"who{i} met @placeholder")) for i in range(5))
    backwards = dict(sorted(texts.items(), reverse=True))
    (tmp_path / "cnn.tgz").write_bytes(tgz({**PROPER, "training": backwards}))
    data = load("cnn", str(tmp_path))
    for i, name in enumerate(sorted(texts)):
        assert f"{names(data, 'train')[i]}.question" == name
        asked = item(data, "train_questions", "train_question_ends", i)
        assert " ".join(asked) in texts[name].decode()
        passage = item(data, "train_passages", "train_passage_ends", i)
        assert passage == ["@entity1", "met", "@entity2", "."]


def test_split_without_valid_questions_is_reported(tmp_path, failure):
    path = unpack(tmp_path, {**PROPER, "test": dict([named(content(answer="met"))])})
    assert failure(tmp_path).startswith(f"{path} holds no valid question of the test split")


def test_text_is_lowercased_and_split_at_ascii_whitespace(tmp_path):
    text = content("  @entity1  Met \u00a0 @entity2\nagain ", "Who\n met @placeholder ")
    unpack(tmp_path, {**PROPER, "test": dict([named(text)])})
    data = load("cnn", str(tmp_path))
    assert item(data, "test_passages", "test_passage_ends", 0) == [
        "@entity1",
        "met",
        "\u00a0",
        "@entity2",
        "again",
    ]
    assert item(data, "test_questions", "test_question_ends", 0) == ["who", "met", "@placeholder"]
    assert item(data, "test_entities", "test_entity_ends", 0) == ["@entity1:A:b", "@entity2:C"]


@pytest.mark.parametrize(("added", "whole"), [("\n", True), ("\n\n", False), (" ", False)])
def test_one_trailing_newline_passes_the_hash_check(added, whole):
    name, data = named(content())
    file = cnn.File("test", name.removesuffix(".question"), data + added.encode())
    assert file.is_whole() == whole


def test_description_has_counts_and_skipped_questions(tmp_path, caplog):
    unpack(tmp_path, {**PROPER, "test": PROPER["test"] | dict([named("")])})
    load("cnn", str(tmp_path))
    lines = described(tmp_path / "prepared" / "cnn")
    assert {
        "  counts: train 1, valid 1, test 1",
        "  complete: false",
        "  skipped: train none, valid none, test (missing block 1)",
    } <= set(lines)
    assert "is not all of CNN" in caplog.text and "Skipped invalid test questions" in caplog.text
