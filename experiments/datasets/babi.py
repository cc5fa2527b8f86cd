"""bAbI tasks 1, 2, 4 and 5 as questions on passages.

The passage of a question has the statements of its story before it. People, places and things are
entities; a name is the same entity in all questions. A question has no placeholder:

    @entity12 moved to the @entity1 . @entity10 went to the @entity8 .
    where is @entity12 ?
    @entity1
"""

import gzip
import hashlib
import itertools
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath

import tensorflow_datasets as tfds

from experiments.datasets import examples
from experiments.datasets.originals import Originals, matching
from experiments.datasets.prepared import Made
from experiments.datasets.question_arrays import ENTITY, Question, pack
from experiments.runtime.errors import UserError

ORIGINALS = Originals("babi", "bAbI")
ARCHIVE = "tasks_1-20_v1-2.tar.gz"
# There are several versions of the archive. The checksums of its texts identify the original.
URLS = (
    f"https://s3.amazonaws.com/text-datasets/babi_{ARCHIVE}",
    f"http://www.thespermwhale.com/jaseweston/babi/{ARCHIVE}",
)
UNPACKED, FOLDER = "tasks_1-20_v1-2", "en-10k"  # the archive's folder; in it, the texts' folder
SHA256 = {
    "qa1_single-supporting-fact_train.txt": (
        "749ea9f7c99070feb2d88c975a254417a0dcc8274add4435ae5ae24c7afc7e9d"
    ),
    "qa1_single-supporting-fact_test.txt": (
        "55acf66cef2f6d798e2aa1d056e1ec8f24e910ea9215b639450574321132959b"
    ),
    "qa2_two-supporting-facts_train.txt": (
        "d4074c0c5d54f70ce2f538056ce2b6ef6a313da336da4245f1a24f1298e37ef3"
    ),
    "qa2_two-supporting-facts_test.txt": (
        "eff93fb9cd81ba02eb765772cf7cc269769ed44ec71cbbbc19cfb16ee5eba0f6"
    ),
    "qa4_two-arg-relations_train.txt": (
        "5d11b821d35234988ab907866aa7ce718e6b6d751acf63bdef52262afb59f12c"
    ),
    "qa4_two-arg-relations_test.txt": (
        "07f0ca18ddeea9eed4ba6d59e162adcb0ce44815721114b3540d92825509331e"
    ),
    "qa5_three-arg-relations_train.txt": (
        "2506910935b701bac64fc8b1d7ff12bd8d0f47ceefca183454282bec784c12a5"
    ),
    "qa5_three-arg-relations_test.txt": (
        "ec825c1c8a76e63a31f0d7a7763cd63740e98332fa9bdf246a19068949bd5f97"
    ),
}
TASKS = ("qa1", "qa2", "qa4", "qa5")
FEATURES = {"story": tfds.features.Text()}

PEOPLE = ("bill", "daniel", "fred", "jeff", "john", "mary", "sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
ENTITIES = {
    name: f"{ENTITY}{number}" for number, name in enumerate(sorted(PEOPLE + PLACES + THINGS))
}


def prepare(source_dir: Path, work_dir: Path) -> Made:
    """Makes the arrays from the original texts, downloading them if they are missing.

    The last tenth of the training stories is for validation: the last 1,000 questions of each task.

    Args:
      source_dir: folder that may have the data, directly or in its subfolder `babi`, in order of
        preference: the original `tasks_1-20_v1-2.tar.gz`; its folder `en-10k`, or
        `tasks_1-20_v1-2` with this folder; an archive `babi*.tgz` or `babi*.tar.gz` that contains
        this folder, such as Keras's or ParlAI's.
      work_dir: folder for downloads.

    Returns:
      For each task the arrays that `experiments/datasets/question_arrays.py` describes, under
      names like `qa1_train_passages`; the metadata: the number of `questions` by task and split;
      the source.

    Raises:
      UserError: if the original is damaged, or there is none and it cannot be downloaded.
    """
    if path := _at_hand(source_dir):
        origin, texts = path.name, _read_texts(path)
    else:
        archive = work_dir / ARCHIVE
        origin, texts = ORIGINALS.download(URLS, archive, _read_texts, [ARCHIVE], source_dir)
    stories = examples.read(
        FEATURES, {name: _stories(text) for name, text in texts.items()}, work_dir
    )
    arrays, counts = {}, {}
    for task in TASKS:
        train, test = (
            _questions(name, [row["story"].decode("ascii") for row in stories[name]])
            for name in (f"{task}_train", f"{task}_test")
        )
        cut = len(train) - len(train) // 10
        parts = {"train": train[:cut], "valid": train[cut:], "test": test}
        splits = {split: list(itertools.chain(*part)) for split, part in parts.items()}
        arrays |= pack(splits, prefix=f"{task}_")
        counts[task] = {split: len(questions) for split, questions in splits.items()}
    source = {"texts": {"from": origin, "sha256": SHA256}, "packages": examples.PACKAGES}
    return arrays, {"questions": counts}, source


def _at_hand(source_dir: Path) -> Path | None:
    """The archive or folder with the texts; None if there is none."""
    for folder in (source_dir, source_dir / ORIGINALS.name):
        for name in (ARCHIVE, FOLDER, f"{UNPACKED}/{FOLDER}"):
            if (folder / name).exists():
                return folder / name
        if archives := matching(folder, "babi*.tgz") + matching(folder, "babi*.tar.gz"):
            return archives[0]
    return None


def _read_texts(path: Path) -> dict[str, str]:
    """The texts by names like `qa1_train`; raises a `UserError` if they are not the original."""
    try:
        contents = _read_folder(path) if path.is_dir() else _read_archive(path)
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise _damaged(path, f"cannot be unpacked ({error})") from error
    texts = {}
    for name, expected in SHA256.items():
        if name not in contents:
            raise _damaged(path, f"lacks {name}")
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != expected:
            raise _damaged(
                path, f"holds a damaged {name}, of SHA-256 {found[:12]} instead of {expected[:12]}"
            )
        task, *_, split = PurePath(name).stem.split("_")
        texts[f"{task}_{split}"] = contents[name].decode("ascii")
    return texts


def _read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in SHA256}


def _read_archive(path: Path) -> dict[str, bytes]:
    contents = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            inside = PurePath(member.name)
            if inside.parent.name == FOLDER and inside.name in SHA256 and member.isfile():
                contents[inside.name] = archive.extractfile(member).read()
    return contents


def _damaged(path: Path, problem: str) -> UserError:
    folder = path.parent.parent if path.parent.name == UNPACKED else path.parent
    return UserError(
        f"{path} {problem}: delete it, and place {ARCHIVE} in the folder {folder}, from {URLS[0]}, "
        "or let it be downloaded"
    )


def _stories(text: str) -> list[dict[str, str]]:
    """The stories of a text, with line numbers; a line numbered 1 starts a story."""
    return [{"story": story} for story in re.split(r"^(?=1 )", text, flags=re.MULTILINE)[1:]]


def _questions(name: str, stories: list[str]) -> list[list[Question]]:
    """The questions of each story; names are `name` and the number in the original text."""
    numbers = itertools.count(1)
    return [
        [
            _question(f"{name}_{next(numbers):05d}", passage, question, answer)
            for passage, question, answer in _asked(story)
        ]
        for story in stories
    ]


def _asked(story: str) -> Iterator[tuple[str, str, str]]:
    """Yields for each question of a story the statements before it, the question and its answer."""
    statements = []
    for line in story.splitlines():
        _, text = line.split(" ", 1)  # the line's number
        if "\t" in text:
            question, answer, _ = text.split("\t")  # at the end, numbers of supporting lines
            yield " ".join(statements), question, answer
        else:
            statements.append(text)


def _question(name: str, passage: str, question: str, answer: str) -> Question:
    words = _words(passage)  # has all entities of the question
    entities = [
        f"{entity}:{known.capitalize() if known in PEOPLE else known}"
        for known, entity in ENTITIES.items()
        if entity in words
    ]
    return Question(name, words, _words(question), ENTITIES[answer.lower()], entities)


def _words(text: str) -> list[str]:
    words = re.findall(r"\w+|[.?]", text.lower())
    return [ENTITIES.get(word, word) for word in words]
