"""CNN: news articles, with questions whose answers are entities.

A question is a file `<SHA-1 of its bytes>.question`, in the folder of its split. The 387,420 files
are read in the order of `read_files`. The words of passages stay in a file until the vocabulary is
known.
"""

import collections
import gzip
import hashlib
import itertools
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from experiments.datasets import examples
from experiments.datasets.originals import matching
from experiments.datasets.prepared import Made, file_sha256
from experiments.datasets.question_arrays import ENTITY, SPLITS, joined, pack_bytes, pack_words
from experiments.runtime.errors import UserError
from experiments.runtime.progress import track

ADDRESS = "https://cs.nyu.edu/~kcho/DMQA/"
COMPLETE = {"train": 380_298, "valid": 3_924, "test": 3_198}
FOLDERS = {"training": "train", "validation": "valid", "test": "test"}
SUFFIX = ".question"
CHUNK = 10_000  # files in memory at a time
TEXTS = ("name", "split", "passage", "question", "answer", "entities", "problem")
FEATURES = {name: tfds.features.Text() for name in TEXTS}


class File(NamedTuple):
    """A question's file: its split, its name without suffix, and its bytes."""

    split: str
    name: str
    content: bytes

    def is_whole(self) -> bool:
        """Whether the name is the content's SHA-1; an editor may have added a final newline."""
        versions = (self.content, self.content.removesuffix(b"\n"))
        return any(hashlib.sha1(version).hexdigest() == self.name for version in versions)


class Row(NamedTuple):
    """A question whose words are numbered in order of first occurrence.

    Attributes:
      name: name of its file.
      start: where its passage begins in the file of words.
      length: number of words of the passage.
      question: words of the question.
      answer: the answer, a word.
      entities: lines like `@entity7:Levinson`; none in training.
    """

    name: str
    start: int
    length: int
    question: list[int]
    answer: int
    entities: str


def prepare(source_dir: Path, work_dir: Path) -> Made:
    """Makes the arrays from the original files.

    Args:
      source_dir: folder that has the data, directly or in its subfolder `cnn`. They are, in order
        of preference: the original `cnn.tgz`; the folder `questions` or `cnn/questions` that it
        unpacks to; one archive `cnn*.tgz` of the same layout, with fewer questions.
      work_dir: folder for the words of passages, 2.5 GB; large arrays stay in files there.

    Returns:
      The arrays that `experiments/datasets/question_arrays.py` describes, the questions of a
      split sorted by name, with `entities` for validation and test; the metadata: `counts` of
      questions by split, whether the files are `complete`, and by split and reason the names of
      `skipped` files, which hold no valid question; the source.

    Raises:
      UserError: if the files are not there, or some are damaged.
    """
    path = find(source_dir)
    numbers: dict[str, int] = {}  # of words
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    skipped = {split: collections.defaultdict(list) for split in SPLITS}
    with (work_dir / "words").open("wb") as words:
        for row in _examples(path, work_dir):
            split, name = row["split"].decode(), row["name"].decode()
            if row["problem"]:
                skipped[split][row["problem"].decode()].append(name)
            else:
                rows[split].append(_numbered(name, row, numbers, words))
    info = _info(path, rows, skipped)
    arrays = _arrays(rows, numbers, work_dir)
    archive = {} if path.is_dir() else {"size": path.stat().st_size, "sha256": file_sha256(path)}
    source = {
        "files": [{"name": path.name, **archive}],
        "address": ADDRESS,
        "packages": examples.PACKAGES,
    }
    return arrays, info, source


def find(source_dir: Path) -> Path:
    """The archive, or the unpacked folder `questions`, in `source_dir` or its subfolder `cnn`.

    Raises:
      UserError: if there is none, or there are several archives and none is `cnn.tgz`.
    """
    folders = (source_dir, source_dir / "cnn")
    for folder in folders:
        if (folder / "cnn.tgz").is_file():
            return folder / "cnn.tgz"
    for folder in (*folders, source_dir / "cnn" / "cnn"):
        if any((folder / "questions" / split).is_dir() for split in FOLDERS):
            return folder / "questions"
    archives = sorted(path for folder in folders for path in matching(folder, "cnn*.tgz"))
    if not archives:
        raise UserError(f"CNN is not in {source_dir}: {_how_to_get(source_dir / 'cnn')}")
    if len(archives) > 1:
        raise UserError(
            f"several archives match cnn*.tgz: {' and '.join(map(str, archives))}; rename the "
            "right one to cnn.tgz"
        )
    return archives[0]


def read_files(path: Path) -> Iterator[File]:
    """Yields the questions' files of an archive or folder, as `find` gives it.

    Raises:
      UserError: if the archive is damaged.
    """
    if path.is_dir():
        for folder, split in FOLDERS.items():
            for name in sorted(os.listdir(path / folder)) if (path / folder).is_dir() else ():
                if _is_question(name):
                    content = (path / folder / name).read_bytes()
                    yield File(split, name.removesuffix(SUFFIX), content)
        return
    try:
        with tarfile.open(path, "r:gz") as archive:
            while member := archive.next():
                archive.members.clear()  # tarfile would keep half a gigabyte of them
                *_, parent, folder, name = ("", "", *member.name.split("/"))
                if parent == "questions" and folder in FOLDERS and _is_question(name):
                    content = archive.extractfile(member).read() if member.isfile() else b""
                    yield File(FOLDERS[folder], name.removesuffix(SUFFIX), content)
            while archive.fileobj.read(1 << 20):  # up to gzip's checksum
                pass
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise _damaged(path, f"cannot be unpacked ({error})") from error


def _is_question(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")


def _examples(path: Path, work_dir: Path) -> Iterator[dict[str, bytes]]:
    """Yields the texts of all questions; raises a `UserError` that names the damaged files."""
    files = track(read_files(path), f"Reading {path}", sum(COMPLETE.values()))
    found, wrong = dict.fromkeys(FOLDERS.values(), 0), []
    while chunk := list(itertools.islice(files, CHUNK)):
        wrong += [f"{file.name}{SUFFIX}" for file in chunk if not file.is_whole()]
        for file in chunk:
            found[file.split] += 1
        if not wrong:
            splits = {"chunk": map(_example, chunk)}
            yield from examples.read(FEATURES, splits, work_dir)["chunk"]
    if wrong:
        raise _damaged(path, f"holds damaged files, {_some(sorted(wrong))}")
    for folder, split in FOLDERS.items():
        if not found[split]:
            raise _damaged(path, f"has no questions in its folder {folder}")


def _example(file: File) -> dict[str, str]:
    """The texts of a file; if it holds no valid question, its name, split and problem."""
    try:
        texts = _parse(file.content)
    except ValueError as error:
        texts = {"problem": str(error)}
    return dict.fromkeys(TEXTS, "") | {"name": file.name, "split": file.split} | texts


def _parse(content: bytes) -> dict[str, str]:
    """The texts of a question's file; raises a `ValueError` that says why it is invalid."""
    try:
        blocks = content.decode().split("\n\n", 4)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    if len(blocks) < 5 or not all(block.strip() for block in blocks[3:]):
        raise ValueError("missing block")
    passage, question, answer = (block.strip().replace("\n", " ") for block in blocks[1:4])
    for name, text in {"passage": passage, "question": question}.items():
        if not text:
            raise ValueError(f"empty {name}")
    if not answer.startswith(ENTITY) or answer not in passage.split(" "):
        raise ValueError("answer that is no entity of the passage")
    return {"passage": passage, "question": question, "answer": answer, "entities": blocks[4]}


def _numbered(name: str, row: dict[str, bytes], numbers: dict[str, int], words: BinaryIO) -> Row:
    """A question as word numbers; adds new words to `numbers`, writes its passage to `words`."""
    passage, question, answer = (
        [
            numbers.setdefault(word, len(numbers))
            for word in row[text].decode().lower().split(" ")
            if word
        ]
        for text in ("passage", "question", "answer")
    )
    start = words.tell() // 4
    words.write(np.array(passage, np.int32))
    lines = [line.strip() for line in row["entities"].decode().split("\n")]
    # Entity names are only for people to read; for training questions they would be large.
    entities = "" if row["split"] == b"train" else "\n".join(lines)
    return Row(name, start, len(passage), question, answer[0], entities)


def _info(
    path: Path, rows: dict[str, list[Row]], skipped: dict[str, dict[str, list[str]]]
) -> dict[str, Any]:
    """The metadata; warns of what is missing or skipped."""
    counts = {split: len(rows[split]) for split in SPLITS}
    found = {split: counts[split] + sum(map(len, skipped[split].values())) for split in SPLITS}
    if found != COMPLETE:
        there = ", ".join(f"{found[split]:,} of {COMPLETE[split]:,} {split}" for split in SPLITS)
        logging.warning("%s is not all of CNN: it holds %s questions", path, there)
    for split, reasons in skipped.items():
        for names in reasons.values():
            names.sort()
        if reasons:
            told = "; ".join(f"{reason}, {_some(names)}" for reason, names in reasons.items())
            logging.warning("Skipped invalid %s questions in %s: %s", split, path, told)
        if not counts[split]:
            raise _damaged(path, f"holds no valid question of the {split} split")
    return {"counts": counts, "complete": found == COMPLETE, "skipped": skipped}


def _arrays(
    rows: dict[str, list[Row]], numbers: dict[str, int], work_dir: Path
) -> dict[str, np.ndarray]:
    """The arrays of all questions, in words of a sorted vocabulary."""
    vocabulary = sorted(numbers)
    table = np.zeros(len(vocabulary), np.int32)
    table[[numbers[word] for word in vocabulary]] = np.arange(len(vocabulary))
    words = np.memmap(work_dir / "words", np.int32, "r")
    arrays = {"vocabulary": pack_words(vocabulary)}
    for split in SPLITS:
        ordered = sorted(rows[split])
        ends = np.cumsum([row.length for row in ordered], dtype=np.int64)
        path = work_dir / f"{split}_passages"
        with path.open("wb") as file:  # a full disk would end a process that writes to a memmap
            for row in ordered:
                file.write(table[words[row.start : row.start + row.length]])
        passages = np.memmap(path, np.int32, "r")
        questions = [table[row.question] for row in ordered]
        arrays[f"{split}_passages"], arrays[f"{split}_passage_ends"] = passages, ends
        arrays[f"{split}_questions"], arrays[f"{split}_question_ends"] = joined(questions, np.int32)
        arrays[f"{split}_answers"] = table[[row.answer for row in ordered]]
        texts = {"name": ("names", [row.name for row in ordered])}
        if split != "train":
            texts["entity"] = ("entities", [row.entities for row in ordered])
        for one, (several, items) in texts.items():
            packed = [pack_bytes(text) for text in items]
            arrays[f"{split}_{several}"], arrays[f"{split}_{one}_ends"] = joined(packed, np.uint8)
    return arrays


def _some(names: list[str]) -> str:
    """The number of names, and the first of them."""
    return f"{len(names):,} in all: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _how_to_get(folder: Path) -> str:
    return (
        f"download cnn.tgz, CNN's Questions, by hand from {ADDRESS} and place it, or the folder "
        f"cnn that it unpacks to, in {folder}"
    )


def _damaged(path: Path, problem: str) -> UserError:
    if path.is_dir():
        return UserError(f"{path} {problem}: delete that folder and unpack cnn.tgz again")
    return UserError(f"{path} {problem}: delete it, {_how_to_get(path.parent)}")
