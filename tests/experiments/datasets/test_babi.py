import gzip
import hashlib
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets import babi

ARCHIVE = "tasks_1-20_v1-2.tar.gz"
STORIES = {"qa1": 2000, "qa2": 2000, "qa4": 10_000, "qa5": 2000}  # in the training texts
SPLITS = {"train": 9000, "valid": 1000, "test": 1000}
NAMES = (
    "apple bathroom bedroom Bill Daniel football Fred garden hallway Jeff John kitchen Mary milk "
    "office Sandra"
)
LABELS = [f"@entity{number}:{name}" for number, name in enumerate(NAMES.split())]


class Split:
    """The questions of a split, as words."""

    def __init__(self, arrays: dict[str, np.ndarray], task: str, split: str) -> None:
        self.vocabulary = bytes(arrays[f"{task}_vocabulary"]).decode().split("\n")
        self.arrays = {
            name.removeprefix(f"{task}_{split}_"): array
            for name, array in arrays.items()
            if name.startswith(f"{task}_{split}_")
        }
        self.answers = [self.vocabulary[word] for word in self.arrays["answers"]]
        self.passages, self.questions = self.texts("passage"), self.texts("question")
        self.names = ["".join(map(chr, name)) for name in self.cut("names", "name_ends")]
        self.entities = [
            "".join(map(chr, lines)).split("\n") for lines in self.cut("entities", "entity_ends")
        ]

    def cut(self, name: str, end_name: str) -> list[list[int]]:
        assert self.arrays[end_name][-1] == len(self.arrays[name])
        starts = [0, *self.arrays[end_name][:-1]]
        values = self.arrays[name].tolist()
        return [values[start:end] for start, end in zip(starts, self.arrays[end_name], strict=True)]

    def texts(self, name: str) -> list[str]:
        return [
            " ".join(map(self.vocabulary.__getitem__, words))
            for words in self.cut(f"{name}s", f"{name}_ends")
        ]


@pytest.fixture(scope="module")
def made(data_dir, tmp_path_factory):
    folder = data_dir / "babi"
    if not any(folder.glob("*gz")) or (folder / "en-10k").exists():
        pytest.skip(f"needs the original bAbI archive in {folder}, and that alone")
    return babi.prepare(data_dir, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def splits(made) -> dict[tuple[str, str], Split]:
    return {(task, split): Split(made[0], task, split) for task in STORIES for split in SPLITS}


@pytest.fixture(scope="module")
def originals(made, data_dir) -> dict[str, list[list[str]]]:
    """The lines of each story, by names like `qa1_train`."""
    stories = {}
    with tarfile.open(data_dir / "babi" / made[2]["texts"]["from"]) as archive:
        for path in archive.getnames():
            if match := re.fullmatch(r"(?:.*/)?en-10k/(qa[1245])_.*_(train|test)\.txt", path):
                found = stories["_".join(match.groups())] = []
                for line in archive.extractfile(path).read().decode().splitlines():
                    if line.startswith("1 "):
                        found.append([])
                    found[-1].append(line)
    return stories


def test_splits_have_the_expected_sizes(made, splits):
    arrays, info, source = made
    assert info == {"questions": {task: SPLITS for task in STORIES}}
    assert source["texts"]["sha256"] == babi.SHA256
    for (_, split), found in splits.items():
        for name in ("passage_ends", "question_ends", "answers", "name_ends", "entity_ends"):
            assert len(found.arrays[name]) == SPLITS[split]
    assert len(arrays) == len(STORIES) * (1 + 9 * len(SPLITS))


@pytest.mark.parametrize(
    ("name", "passage", "question", "answer"),
    [
        (
            "qa1_train_00002",
            "@entity12 moved to the @entity1 . @entity10 went to the @entity8 . "
            "@entity4 went back to the @entity8 . @entity15 moved to the @entity7 .",
            "where is @entity4 ?",
            "@entity8",
        ),
        (
            "qa2_train_00001",
            "@entity12 moved to the @entity1 . @entity15 journeyed to the @entity2 . "
            "@entity12 got the @entity5 there . @entity10 went to the @entity11 . "
            "@entity12 went back to the @entity11 . @entity12 went back to the @entity7 .",
            "where is the @entity5 ?",
            "@entity7",
        ),
        (
            "qa4_train_00002",
            "the @entity11 is west of the @entity7 . the @entity8 is west of the @entity11 .",
            "what is the @entity7 east of ?",
            "@entity11",
        ),
        (
            "qa5_train_00002",
            "@entity3 travelled to the @entity14 . @entity3 picked up the @entity5 there . "
            "@entity3 went to the @entity2 . @entity3 gave the @entity5 to @entity6 . "
            "@entity6 handed the @entity5 to @entity3 . @entity9 went back to the @entity14 .",
            "who received the @entity5 ?",
            "@entity3",
        ),
    ],
)
def test_questions_match_known_examples(splits, name, passage, question, answer):
    found = splits[name.split("_")[0], "train"]
    row = found.names.index(name)
    assert found.passages[row] == passage
    assert found.questions[row] == question
    assert found.answers[row] == answer


def test_questions_decode_to_the_original_text(splits, originals):
    labels = dict(label.split(":") for label in LABELS)

    def spelled(text: str) -> list[str]:
        return [labels.get(word, word) for word in text.split()]

    def words(lines: list[str]) -> list[str]:
        """In the spelling of the arrays: lower case except people, marks apart, no line numbers."""
        text = re.sub(r"^[0-9]+ ", "", "\n".join(lines), flags=re.MULTILINE)
        text = re.sub(r"\b(The|Where|What|Who)\b", lambda word: word[0].lower(), text)
        return re.sub(r"([.?])", r" \1", text).split()

    for task in STORIES:
        expected = {}
        for text in ("train", "test"):
            lines = [(story, i) for story in originals[f"{task}_{text}"] for i in range(len(story))]
            asked = [(story, i) for story, i in lines if "\t" in story[i]]
            for number, (story, i) in enumerate(asked, start=1):
                expected[f"{task}_{text}_{number:05d}"] = story, i
        for split in SPLITS:
            found = splits[task, split]
            for row in range(0, SPLITS[split], 7):
                story, i = expected[found.names[row]]
                question, answer, _ = story[i].split("\t")
                assert spelled(found.passages[row]) == words(
                    [line for line in story[:i] if "\t" not in line]
                )
                assert spelled(found.questions[row]) == words([question])
                assert spelled(found.answers[row]) == [answer]


def test_answers_are_entities_of_their_passages(splits):
    for found in splits.values():
        for passage, question, answer, entities in zip(
            found.passages, found.questions, found.answers, found.entities, strict=True
        ):
            words = {*passage.split(), *question.split()}
            assert answer.startswith("@entity") and answer in passage.split()
            assert entities == [label for label in LABELS if label.split(":")[0] in words]
            assert sum(word.startswith("@entity") for word in words) == len(entities)


def test_splits_share_no_story(splits, originals):
    for task, count in STORIES.items():
        stories = originals[f"{task}_train"]
        assert len(stories) == count
        story_of = [index for index, story in enumerate(stories) for line in story if "\t" in line]
        train, valid = (
            [story_of[int(name.rpartition("_")[2]) - 1] for name in splits[task, split].names]
            for split in ("train", "valid")
        )
        assert train + valid == story_of  # every question once, in order
        assert max(train) < min(valid)
        assert splits[task, "test"].names == [f"{task}_test_{n:05d}" for n in range(1, 1001)]


@pytest.fixture
def texts(monkeypatch) -> dict[str, bytes]:
    """Replaces the real texts with texts of 20 stories for training and 3 for testing."""

    def text(stories: int) -> bytes:
        people = ("Mary", "John", "Daniel")
        return "".join(
            f"1 {people[i % 3]} went to the garden.\n"
            f"2 {people[i % 2]} moved to the office.\n"
            f"3 Where is {people[i % 2]}? \toffice\t2\n"
            for i in range(stories)
        ).encode()

    texts = {name: text(20 if name.endswith("_train.txt") else 3) for name in babi.SHA256}
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    monkeypatch.setattr(babi, "SHA256", hashes)
    return texts


def packed(texts: dict[str, bytes], folder: str) -> bytes:
    """An archive with the texts in a folder, and with others of the same names elsewhere."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in texts.items():
            for path, content in ((f"{folder}/{name}", text), (f"hn-10k/{name}", b"Hindi")):
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def place(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def place_folder(folder: Path, texts: dict[str, bytes]) -> Path:
    for name, text in texts.items():
        place(folder / name, text)
    return folder


def test_archives_and_folders_give_the_same_arrays(tmp_path, texts):
    tmp_path /= "[a]*"  # not a pattern
    place(tmp_path / "original" / ARCHIVE, packed(texts, "tasks_1-20_v1-2/en-10k"))
    place(tmp_path / "subfolder" / "babi" / "babi_four.tgz", packed(texts, "en-10k"))
    place_folder(tmp_path / "folder" / "babi" / "en-10k", texts)
    place_folder(tmp_path / "unpacked" / "babi" / "tasks_1-20_v1-2" / "en-10k", texts)
    place(tmp_path / "keras" / "babi_tasks_1-20_v1-2.tar.gz", packed(texts, "tasks/en-10k"))
    arrays, info, source = babi.prepare(tmp_path / "original", tmp_path)
    assert info == {"questions": {task: {"train": 18, "valid": 2, "test": 3} for task in STORIES}}
    assert source["texts"] == {"from": ARCHIVE, "sha256": babi.SHA256}
    assert Split(arrays, "qa5", "valid").passages[1] == (
        "@entity10 went to the @entity7 . @entity10 moved to the @entity14 ."
    )
    for form, name in {
        "subfolder": "babi_four.tgz",
        "folder": "en-10k",
        "unpacked": "en-10k",
        "keras": "babi_tasks_1-20_v1-2.tar.gz",
    }.items():
        others, other_info, other_source = babi.prepare(tmp_path / form, tmp_path)
        assert other_source["texts"]["from"] == name and other_info == info
        assert others.keys() == arrays.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(others[key], array)


def test_original_archive_is_preferred(tmp_path, texts):
    place(tmp_path / "babi" / "babi_other.tgz", b"not read")
    place_folder(tmp_path / "babi" / "en-10k", dict.fromkeys(texts, b"not read"))
    place(tmp_path / "babi" / ARCHIVE, packed(texts, "en-10k"))
    assert babi.prepare(tmp_path, tmp_path)[2]["texts"]["from"] == ARCHIVE


def test_missing_original_is_downloaded(tmp_path, texts, host, monkeypatch):
    host[babi.URLS[0]] = packed(dict.fromkeys(texts, b"1 Mary went.\n"), "tasks_1-20_v1-2/en-10k")
    host[babi.URLS[1]] = packed(texts, "tasks_1-20_v1-2/en-10k")
    opened, read = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args: opened.append(args) or read(*args))
    arrays, _, source = babi.prepare(tmp_path, tmp_path)
    assert source["texts"] == {"from": babi.URLS[1], "sha256": babi.SHA256}
    assert len(opened) == 2  # each address once
    for key, array in babi.prepare(tmp_path, tmp_path)[0].items():
        np.testing.assert_array_equal(arrays[key], array)


def test_damaged_unpacked_text_error_names_the_archive_folder(tmp_path, texts, load_error):
    path = place_folder(tmp_path / "babi" / "tasks_1-20_v1-2" / "en-10k", texts)
    next(path.iterdir()).write_text("")
    message = load_error("babi", tmp_path)
    assert message.startswith(f"{path} holds a damaged ")
    assert f"place {ARCHIVE} in the folder {tmp_path / 'babi'}, from http" in message


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: content[:200_000], "Compressed file ended before"),
        (lambda content: content[:200_000] + b"\xff" * 70_000, "Error -3 while decompressing"),
        (
            lambda content: gzip.compress(gzip.decompress(content)[:5000])[:-8] + bytes(8),
            "CRC check",
        ),
        (lambda content: b"<html>", "not a gzip file"),
        (lambda content: b"", "empty file"),
        (lambda content: gzip.compress(b"no tar" * 999), "invalid header"),
    ],
)
def test_damaged_archive_is_reported(tmp_path, texts, damage, problem, load_error):
    first, *_ = texts
    noise = np.random.default_rng(0).bytes(400_000)  # so that most of the archive is this text
    content = packed(texts | {first: noise}, "en-10k")
    path = place(tmp_path / "babi" / ARCHIVE, damage(content))
    message = load_error("babi", tmp_path)
    assert message.startswith(f"{path} cannot be unpacked (") and problem in message
    assert f"place {ARCHIVE} in the folder {path.parent}, from http" in message


@pytest.mark.parametrize("form", ["archive", "folder"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_missing_or_damaged_text_is_reported(tmp_path, texts, form, damage, load_error):
    name = "qa4_two-arg-relations_test.txt"
    text = texts.pop(name)
    if damage == "changed":
        texts[name] = text.replace(b"Mary", b"Marx", 1)
    if form == "archive":
        path = place(tmp_path / "babi.tgz", packed(texts, "en-10k"))
    else:
        path = place_folder(tmp_path / "babi" / "en-10k", texts)
    problem = f"lacks {name}: " if damage == "missing" else f"holds a damaged {name}, of SHA-256 "
    message = load_error("babi", tmp_path)
    assert message.startswith(f"{path} {problem}")
    assert f"delete it, and place {ARCHIVE} in the folder {path.parent}, from http" in message
