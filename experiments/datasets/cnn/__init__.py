"""CNN: news, with questions to answer by an entity.

The 380,298 files are read by several processes, a part at a time. Each part is kept in a folder
for work in progress: stopped and started again, the preparation goes on from there.
"""

import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from experiments.datasets import examples
from experiments.datasets.cnn.files import ADDRESS, SUFFIX, Part, damaged, find, list_parts
from experiments.datasets.prepared import Made, file_sha256
from experiments.datasets.question_arrays import (
    ENTITY,
    SPLITS,
    Question,
    pack,
    pack_words,
    sorted_words,
)

COMPLETE = {"train": 380_298, "valid": 3_924, "test": 3_198}
PROCESSES = 4  # at most: all together they take less than 2 GB, also with JAX in each of them
FORMAT = 1  # of the parts that are kept; raised when older ones can no longer be used
ENDS = {
    "passages": "passage_ends",
    "questions": "question_ends",
    "names": "name_ends",
    "entities": "entity_ends",
}
TYPES = {"passages": np.int32, "questions": np.int32, "names": np.uint8, "entities": np.uint8}
TEXTS = ("name", "passage", "question", "answer", "entities", "problem")
FEATURES = {name: tfds.features.Text() for name in TEXTS}


def prepare(source_dir: Path, work_dir: Path) -> Made:
    """Makes the arrays from the original files.

    Args:
        source_dir: Folder in which, or in whose subfolder `cnn`, are looked for, in this order:
            the original `cnn.tgz`; the folder `questions` or `cnn/questions` that it unpacks to;
            one archive `cnn*.tgz` of the same layout, with fewer questions.
        work_dir: Folder for work in progress, which takes 5 GB; large arrays stay in files there.

    Returns:
        The arrays that `experiments/datasets/question_arrays.py` describes, the questions of a
        split in the order of their names, with `entities` for validation and test; the metadata:
        `counts` of questions by split, whether the files are `complete`, and the names of those
        `skipped`, by split and reason, because they hold no proper question; the source.

    Raises:
        UserError: If the files are not there, or some are damaged.
        OSError: If `work_dir` cannot be written, or a process ends for lack of memory.
    """
    path = find(source_dir)
    parts = list_parts(path, work_dir)
    try:
        made = _made(parts, path, work_dir)
    except BrokenProcessPool as error:
        raise OSError(str(error)) from error
    info = _info(parts, made, path)
    return _joined(parts, made, work_dir), info, _source(path)


def _made(parts: list[Part], path: Path, work_dir: Path) -> list[Path]:
    """Files with the arrays of each part, made where they are not there already."""
    from experiments.runtime.progress import track  # here because the processes need no JAX

    # The names of its files, which are hashes, tell what a part holds.
    keys = [json.dumps([FORMAT, part.split, *part.places]).encode() for part in parts]
    made = [work_dir / f"part-{hashlib.sha1(key).hexdigest()}.npz" for key in keys]
    left = [part for part, file in zip(parts, made, strict=True) if not file.exists()]
    missing = [file for file in made if not file.exists()]
    if left:
        with _pool(min(len(left), PROCESSES), work_dir) as pool:
            # All files before the first is read: whoever has a damaged one learns it soon.
            checks = track(pool.map(Part.damaged, left), f"Verifying {path}", len(left))
            if wrong := [f"{name}{SUFFIX}" for names in checks for name in names]:
                raise damaged(path, f"holds damaged files, {_some(wrong)}")
            for _ in track(pool.map(_make, left, missing), f"Reading {path}", len(left)):
                pass
    return made


@contextlib.contextmanager
def _pool(processes: int, work_dir: Path) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the cores; when it is left early, they end after the part at hand."""
    pool = ProcessPoolExecutor(
        min(os.cpu_count() or 1, processes),
        multiprocessing.get_context("spawn"),  # a fork would copy the threads' locks of JAX
        _begin,
        (work_dir,),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work_dir: Path) -> None:
    """Begins a process of the pool."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()  # if that one is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    tempfile.tempdir = str(work_dir)  # with which everything is removed


def _make(part: Part, file: Path) -> None:
    """Writes the arrays of a part."""
    rows = examples.read(FEATURES, {part.split: _examples(part)})[part.split]
    skipped = collections.defaultdict(list)
    for row in rows:
        if row["problem"]:
            skipped[row["problem"].decode()].append(row["name"].decode())
    arrays = pack({part.split: [_question(row) for row in rows if not row["problem"]]})
    temporary = file.with_suffix(f".{os.getpid()}.npz")
    np.savez(temporary, skipped=np.array(json.dumps(skipped)), **arrays)
    os.replace(temporary, file)


def _examples(part: Part) -> Iterator[dict[str, str]]:
    """Yields the texts of each file: where it holds no proper question, its name and why."""
    for name, content in part.contents():
        try:
            texts = _parse(content)
        except ValueError as error:
            texts = {"problem": str(error)}
        yield dict.fromkeys(TEXTS, "") | {"name": name} | texts


def _parse(content: bytes) -> dict[str, str]:
    """The texts of a question's file; a `ValueError` says why it holds no proper question."""
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


def _question(row: dict[str, bytes]) -> Question:
    def words(name: str) -> list[str]:
        return [word for word in row[name].decode().lower().split(" ") if word]

    (answer,) = words("answer")
    entities = [line.strip() for line in row["entities"].decode().split("\n")]
    return Question(row["name"].decode(), words("passage"), words("question"), answer, entities)


def _vocabulary(part: Any) -> list[str]:
    """The words of a part's arrays."""
    return part["vocabulary"].tobytes().decode().split("\n")


def _joined(parts: list[Part], made: list[Path], work_dir: Path) -> dict[str, np.ndarray]:
    """The arrays of all parts, one after the other, in words of one vocabulary."""
    from experiments.runtime.progress import track  # here because the processes need no JAX

    vocabulary: set[str] = set()
    for file in made:
        with np.load(file) as part:
            vocabulary.update(_vocabulary(part))
    words = sorted_words(vocabulary)
    index = {word: i for i, word in enumerate(words)}
    columns = {
        f"{split}_{kind}": f"{split}_{end}" for split in SPLITS for kind, end in ENDS.items()
    }
    del columns["train_entities"]  # would be large, and they are there for people to read
    small = collections.defaultdict(list)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((work_dir / name).open("wb")) for name in columns}
        every = track(zip(parts, made, strict=True), "Joining the parts", len(parts))
        for (split, *_), file in every:
            with np.load(file) as part:
                table = np.array([index[word] for word in _vocabulary(part)], np.int32)
                small[f"{split}_answers"].append(table[part[f"{split}_answers"]])
                for kind in ENDS:
                    name = f"{split}_{kind}"
                    if name in columns:
                        values, ends = part[name], part[columns[name]]
                        start = files[name].tell() // values.itemsize
                        files[name].write(values if values.dtype == np.uint8 else table[values])
                        small[columns[name]].append(start + ends)
    large = {
        name: np.memmap(work_dir / name, TYPES[name.partition("_")[2]], "r") for name in columns
    }
    joined = {name: np.concatenate(arrays) for name, arrays in small.items()}
    return {"vocabulary": pack_words(words), **large, **joined}


def _info(parts: list[Part], made: list[Path], path: Path) -> dict[str, Any]:
    """The metadata; warns of what is missing or skipped."""
    found, counts = collections.Counter(), collections.Counter()
    skipped: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for part, file in zip(parts, made, strict=True):
        found[part.split] += len(part.places)
        with np.load(file) as arrays:
            counts[part.split] += len(arrays[f"{part.split}_answers"])
            for reason, names in json.loads(arrays["skipped"].item()).items():
                skipped[part.split].setdefault(reason, []).extend(names)
    if found != COMPLETE:
        there = ", ".join(f"{found[split]:,} of {COMPLETE[split]:,} {split}" for split in SPLITS)
        logging.warning("%s is not all of CNN: it holds %s questions", path, there)
    for split, reasons in skipped.items():
        if reasons:
            told = "; ".join(f"{reason}, {_some(names)}" for reason, names in reasons.items())
            logging.warning("Skipped of the %s questions in %s: %s", split, path, told)
        if not counts[split]:
            raise damaged(path, f"holds no proper question of the {split} split")
    return {"counts": dict(counts), "complete": found == COMPLETE, "skipped": skipped}


def _some(names: list[str]) -> str:
    """How many names there are, and the first of them."""
    return f"{len(names):,} in all: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _source(path: Path) -> dict[str, Any]:
    archive = {} if path.is_dir() else {"size": path.stat().st_size, "sha256": file_sha256(path)}
    return {
        "files": [{"name": path.name, **archive}],
        "address": ADDRESS,
        "packages": examples.PACKAGES,
    }
