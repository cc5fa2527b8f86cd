"""Questions on passages: loads them, cuts passages to sentences, and makes the vocabulary."""

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments import datasets
from experiments.datasets.question_arrays import ENTITY, PLACEHOLDER, SPLITS, joined
from experiments.runtime.checks import one_of
from experiments.runtime.progress import track

NIL, UNKNOWN, NUMBER = SPECIALS = ("<nil>", "<unk>", "<num>")  # padding; rare words; digits
SENTENCE_ENDS = (".", "!", "?")
SENTENCE_RULES = ("words", "entities", "rare_words")
SENTENCE_TIES = ("earlier", "later")
COUNTED = 1 << 24  # words at a time
CHOSEN = 20  # passages at a time


@dataclasses.dataclass(frozen=True)
class Texts:
    """Concatenated texts.

    Attributes:
      words: int32 [tokens], indices of words.
      ends: int64 [N], where each text ends.
    """

    words: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """The words of text 0, 1, ..."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.words[self.ends[index - 1] if index else 0 : self.ends[index]]

    def piece(self, start: int, stop: int) -> "Texts":
        """The texts `start` to `stop - 1`."""
        first = self.ends[start - 1] if start else 0
        ends = self.ends[start:stop]
        return Texts(self.words[first : ends[-1]], ends - first)

    @property
    def lengths(self) -> np.ndarray:
        """Numbers of words, int64 [N]."""
        return np.diff(self.ends, prepend=0)


class Split(NamedTuple):
    """The questions of a split.

    Attributes:
      passages: N passages.
      questions: N questions.
      answers: int32 [N], a word each.
      indices: int64 [N], the numbers of the questions in the data set as prepared.
    """

    passages: Texts
    questions: Texts
    answers: np.ndarray
    indices: np.ndarray

    def select(self, chosen: np.ndarray) -> "Split":
        """The questions at these positions."""
        return Split(
            Texts(*joined([self.passages[i] for i in chosen], np.int32)),
            Texts(*joined([self.questions[i] for i in chosen], np.int32)),
            self.answers[chosen],
            self.indices[chosen],
        )


@dataclasses.dataclass(frozen=True)
class Questions:
    """A data set of questions.

    Attributes:
      name: name of the data in results.
      words: the words to which the indices in `splits` refer.
      splits: `train`, `valid` and `test`.
      digest: SHA-256 of the prepared data.
      skipped: how many questions preparation left out, by split.
      arrays: as `question_arrays` describes them, without a prefix.
    """

    name: str
    words: list[str]
    splits: dict[str, Split]
    digest: str
    skipped: dict[str, int]
    arrays: dict[str, np.ndarray]

    def describe(self, split: str, number: int) -> tuple[str, dict[str, str]]:
        """The name of a question, and the names of its entities if the data have them.

        `number` is the question's index in the data set as prepared.
        """

        def text(plural: str, singular: str) -> str:
            ends = self.arrays.get(f"{split}_{singular}_ends")
            if ends is None:
                return ""
            start = ends[number - 1] if number else 0
            return bytes(self.arrays[f"{split}_{plural}"][start : ends[number]]).decode()

        entities = (line.partition(":") for line in text("entities", "entity").split("\n"))
        return text("names", "name"), {entity: name for entity, _, name in entities}


class Selection(NamedTuple):
    """How the sentences of a passage are chosen; see `choose_sentences`.

    Attributes:
      number: how many sentences are kept.
      rule: the weights of shared words, one of `SENTENCE_RULES`; see `word_weights`.
      length_power: scores are divided by this power of the number of words.
      ties: whether the `earlier` or the `later` of two sentences with equal scores is kept.
    """

    number: int
    rule: str
    length_power: float
    ties: str


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words that a model knows.

    Attributes:
      words: the special words, then the words of training data, the most frequent first.
      table: int32, maps the index of a word in the data set to its index in `words`.
      entities: int32, the indices of entities in `words`.
    """

    words: list[str]
    table: np.ndarray
    entities: np.ndarray


def check(dataset: str, subset: str) -> None:
    """Refuses an unknown data set or subset.

    Raises:
      UserError: names the config field and what it may be.
    """
    one_of("config.dataset", dataset, ("cnn", "babi"))
    one_of("config.subset", subset, ("",) if dataset == "cnn" else ("qa1", "qa2", "qa4", "qa5"))


def load(dataset: str, data_dir: str, subset: str = "") -> Questions:
    """Loads a data set of questions. Call `check` before.

    Args:
      dataset: `cnn` or `babi`.
      data_dir: folder of prepared data and original files.
      subset: the task of bAbI: `qa1`, `qa2`, `qa4` or `qa5`.

    Raises:
      UserError: the data cannot be loaded.
    """
    data = datasets.load(dataset, data_dir)
    prefix = f"{subset}_" if subset else ""
    arrays = {
        name.removeprefix(prefix): array
        for name, array in data.arrays.items()
        if name.startswith(prefix)
    }

    def texts(name: str) -> Texts:
        return Texts(arrays[name], arrays[f"{name.removesuffix('s')}_ends"])

    splits = {}
    for split in SPLITS:
        answers = arrays[f"{split}_answers"]
        passages, questions = texts(f"{split}_passages"), texts(f"{split}_questions")
        splits[split] = Split(passages, questions, answers, np.arange(len(answers)))
    counts = {split: len(splits[split].answers) for split in SPLITS}
    if dataset == "babi":
        name = f"bAbI task {subset.removeprefix('qa')}"
    elif data.info["complete"]:
        name = "CNN"
    else:
        name = f"part of CNN ({' / '.join(f'{counts[split]:,}' for split in SPLITS)} questions)"
    words = bytes(arrays["vocabulary"]).decode().split("\n")
    skipped = data.info.get("skipped", {})
    skipped = {split: sum(map(len, skipped.get(split, {}).values())) for split in SPLITS}
    return Questions(name, words, splits, data.digest, skipped, arrays)


def make_vocabulary(questions: Questions, min_count: int, join_numbers: bool) -> Vocabulary:
    """The words of training passages, questions and answers that occur often enough.

    Args:
      questions: the data set, with passages as the model sees them.
      min_count: words that occur less often become `<unk>`.
      join_numbers: words of digits become `<num>`.
    """
    size = len(questions.words)
    train = questions.splits["train"]
    parts = train.passages.words, train.questions.words, train.answers
    counts = sum(_count(part, size) for part in parts)
    table = np.full(size, SPECIALS.index(UNKNOWN), np.int32)
    is_number = np.array([join_numbers and word.isdigit() for word in questions.words])
    table[is_number] = SPECIALS.index(NUMBER)
    known = np.flatnonzero((counts >= min_count) & ~is_number)
    known = known[np.argsort(-counts[known], kind="stable")]  # equal counts in alphabetical order
    table[known] = len(SPECIALS) + np.arange(len(known))
    words = [*SPECIALS, *(questions.words[i] for i in known)]
    entities = np.array([i for i, word in enumerate(words) if ENTITY in word], np.int32)
    return Vocabulary(words, table, entities)


def select_sentences(questions: Questions, selection: Selection) -> Questions:
    """Cuts each passage to the sentences that are most like its question."""
    ends_sentence = np.array([word in SENTENCE_ENDS for word in questions.words])
    weights = word_weights(questions, selection.rule)
    cut = {}
    for split, part in questions.splits.items():
        starts = range(0, len(part.answers), CHOSEN)
        chosen = [
            choose_sentences(
                part.passages.piece(start, start + CHOSEN),
                part.questions.piece(start, start + CHOSEN),
                selection,
                ends_sentence,
                weights,
            )
            for start in track(starts, f"choosing sentences, {split}", len(starts))
        ]
        cut[split] = part._replace(
            passages=Texts(*joined([text for texts in chosen for text in texts], np.int32))
        )
    name = f"{questions.name}, {selection.number} sentences"
    return dataclasses.replace(questions, name=name, splits=cut)


def word_weights(questions: Questions, rule: str) -> np.ndarray:
    """The weight of each word that a sentence shares with its question, float64 [words].

    Args:
      questions: the data set.
      rule: `words`, 1 for each; `entities`, 1 for entities and 0 for others; `rare_words`, the
        information content in nats, from the frequency in training passages. With `words` and
        `rare_words`, the placeholder and words without letters or digits have weight 0.
    """
    spoken = np.array([any(c.isalnum() for c in w) and w != PLACEHOLDER for w in questions.words])
    if rule == "entities":
        return np.array([float(ENTITY in word) for word in questions.words])
    if rule == "rare_words":
        train = questions.splits["train"].passages.words
        counts = _count(train, len(questions.words))
        return spoken * np.log(len(train) / np.maximum(counts, 1))
    return spoken.astype(float)


def choose_sentences(
    passages: Texts,
    questions: Texts,
    selection: Selection,
    ends_sentence: np.ndarray,
    weights: np.ndarray,
) -> list[np.ndarray]:
    """The sentences of each passage that are most like its question, in their order.

    The score of a sentence is the sum of the weights of the distinct words that it shares with the
    question, divided by a power of its length. It does not depend on the answer.

    Args:
      passages: some passages.
      questions: their questions.
      selection: how many sentences, and how they are scored.
      ends_sentence: whether a word ends the sentence that it is in, bool [words].
      weights: the weight of a shared word, float64 [words].
    """
    number = np.arange(len(passages))
    words, passage = passages.words, np.repeat(number, passages.lengths)
    asked = np.zeros((len(number), len(weights)), bool)
    asked[np.repeat(number, questions.lengths), questions.words] = True

    ends = ends_sentence[words]
    ends[passages.ends - 1] = True
    sentence = np.cumsum(ends) - ends  # of each word; numbers go on through all passages
    owner, lengths = passage[ends], np.bincount(sentence)  # of each sentence
    shared = asked[passage, words]
    pairs = np.unique(sentence[shared] * len(weights) + words[shared])
    of, word = np.divmod(pairs, len(weights))
    scores = np.bincount(of, weights[word], len(lengths)) / lengths**selection.length_power

    place = np.arange(len(lengths))
    ties = place if selection.ties == "earlier" else -place
    order = np.lexsort((ties, -scores, owner))  # each passage's sentences, the best first
    first = np.searchsorted(owner, owner)  # where sentences of the same passage begin
    kept = np.zeros(len(lengths), bool)
    kept[order[place - first < selection.number]] = True
    left = kept[sentence]
    counts = np.bincount(passage[left], minlength=len(number))
    return np.split(words[left], np.cumsum(counts)[:-1])


def answers_kept(split: Split) -> float:
    """The share of questions whose answer is in the passage."""
    kept = [answer in split.passages[i] for i, answer in enumerate(split.answers)]
    return float(np.mean(kept))


def _count(words: np.ndarray, size: int) -> np.ndarray:
    """How often each word occurs, counted in pieces because `bincount` copies to 64 bits."""
    pieces = np.split(words, range(COUNTED, len(words), COUNTED))
    return sum(np.bincount(piece, minlength=size) for piece in pieces)
