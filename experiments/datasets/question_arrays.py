"""The arrays of a prepared data set of questions on passages.

The data set has these arrays for each split, under names like `train_passages`:

    passages, passage_ends      int32 [tokens], the words of all passages, concatenated, as indices
                                into `vocabulary`; and int64 [N], the end of each passage
    questions, question_ends    the same for the questions
    answers                     int32 [N], words of the vocabulary too
    names, name_ends            uint8 [bytes] and int64 [N]: the name of each question
    entities, entity_ends       uint8 [bytes] and int64 [N]: lines like `@entity7:Levinson`, the
                                real names of each question's entities; may be left out

`vocabulary` uint8 [bytes] holds the words of all splits, sorted, a line each, in UTF-8.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "valid", "test")
ENTITY = "@entity"  # words that contain it stand for entities
PLACEHOLDER = "@placeholder"  # stands for the answer, in a question


class Question(NamedTuple):
    """A question as words.

    Attributes:
      name: name of the question.
      passage: words of the passage.
      question: words of the question.
      answer: a word, one of the passage's entities.
      entities: lines like `@entity7:Levinson`.
    """

    name: str
    passage: list[str]
    question: list[str]
    answer: str
    entities: list[str]


def pack_words(words: Iterable[str]) -> np.ndarray:
    """Words as the bytes of an array, a line each."""
    return pack_bytes("\n".join(words))


def pack_bytes(text: str) -> np.ndarray:
    """A text as an array of its bytes in UTF-8."""
    return np.frombuffer(text.encode(), np.uint8)


def joined(items: Sequence[np.ndarray], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """The concatenated arrays of a dtype, and the end of each, int64."""
    ends = np.cumsum([len(item) for item in items], dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype), *items]), ends


def pack(splits: dict[str, list[Question]], prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a data set that fits in memory as words."""
    every = [question for questions in splits.values() for question in questions]
    vocabulary = sorted({word for q in every for word in (*q.passage, *q.question, q.answer)})
    index = {word: i for i, word in enumerate(vocabulary)}
    arrays = {f"{prefix}vocabulary": pack_words(vocabulary)}

    def add(name: str, end_name: str, items: list[np.ndarray], dtype: type) -> None:
        arrays[name], arrays[end_name] = joined(items, dtype)

    def words(text: list[str]) -> np.ndarray:
        return np.array([index[word] for word in text], np.int32)

    for split, questions in splits.items():
        to = f"{prefix}{split}_"
        add(f"{to}passages", f"{to}passage_ends", [words(q.passage) for q in questions], np.int32)
        add(
            f"{to}questions", f"{to}question_ends", [words(q.question) for q in questions], np.int32
        )
        arrays[f"{to}answers"] = words([q.answer for q in questions])
        add(f"{to}names", f"{to}name_ends", [pack_bytes(q.name) for q in questions], np.uint8)
        entities = [pack_bytes("\n".join(q.entities)) for q in questions]
        add(f"{to}entities", f"{to}entity_ends", entities, np.uint8)
    return arrays
