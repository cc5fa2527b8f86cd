import dataclasses

import numpy as np
import pytest

from experiments.datasets import questions
from experiments.datasets.question_arrays import SPLITS, Question, pack
from experiments.datasets.questions import Selection, Split, Texts
from experiments.runtime.errors import UserError

# Words of ASKED:       who met                    @entity2                  met @entity2
PASSAGE = "nobody knows who met whom . it rained ! @entity2 slept . @entity1 met @entity2 twice ?"
ASKED = "who met @entity2 in @placeholder"


def made(*texts, prefix=""):
    """A data set with the same questions in each split."""
    items = [
        Question(f"q{i}", passage.split(), question.split(), answer, ["@entity1:Ann", "@entity2:B"])
        for i, (passage, question, answer) in enumerate(texts)
    ]
    arrays = pack(dict.fromkeys(SPLITS, items), prefix)

    def split(name):
        def texts(kind):
            ends = arrays[f"{prefix}{name}_{kind.removesuffix('s')}_ends"]
            return Texts(arrays[f"{prefix}{name}_{kind}"], ends)

        answers = arrays[f"{prefix}{name}_answers"]
        return Split(texts("passages"), texts("questions"), answers, np.arange(len(answers)))

    words = bytes(arrays[f"{prefix}vocabulary"]).decode().split("\n")
    splits = {name: split(name) for name in SPLITS}
    return questions.Questions("made", words, splits, "", {}, arrays)


def spell(data, text):
    return " ".join(data.words[i] for i in text)


def test_packed_questions_round_trip():
    data = made((PASSAGE, ASKED, "@entity1"), ("a b .", "b ?", "a"))
    for split in data.splits.values():
        assert [spell(data, split.passages[i]) for i in (0, 1)] == [PASSAGE, "a b ."]
        assert [spell(data, split.questions[i]) for i in (0, 1)] == [ASKED, "b ?"]
        assert spell(data, split.answers) == "@entity1 a"
        assert split.passages.lengths.tolist() == [17, 3]
    assert data.words == sorted(data.words)
    assert data.describe("valid", 1) == ("q1", {"@entity1": "Ann", "@entity2": "B"})
    chosen = data.splits["test"].select(np.array([1]))
    assert spell(data, chosen.passages[0]) == "a b ." and chosen.indices.tolist() == [1]


FIRST, SECOND = "nobody knows who met whom .", "it rained !"
THIRD, FOURTH = "@entity2 slept .", "@entity1 met @entity2 twice ?"


# Scores of the four sentences, computed by hand. With the question they share: who and met;
# nothing; @entity2; met and @entity2. Punctuation and the placeholder do not count.
@pytest.mark.parametrize(
    "number, rule, power, ties, expected",
    [
        (1, "words", 0, "earlier", FIRST),  # 2 against 2
        (1, "words", 0, "later", FOURTH),
        (1, "words", 1, "earlier", FOURTH),  # 2/6, 0, 1/3, 2/5
        (2, "words", 1, "earlier", f"{FIRST} {FOURTH}"),
        (2, "words", 1, "later", f"{THIRD} {FOURTH}"),
        (1, "words", 2, "earlier", THIRD),  # 2/36, 0, 1/9, 2/25
        (1, "entities", 0, "earlier", THIRD),
        (2, "entities", 0, "earlier", f"{THIRD} {FOURTH}"),
        (3, "entities", 0, "earlier", f"{FIRST} {THIRD} {FOURTH}"),
        (3, "entities", 0, "later", f"{SECOND} {THIRD} {FOURTH}"),
        (1, "rare_words", 0, "earlier", FIRST),  # who is rarer than @entity2
        (9, "words", 0, "earlier", PASSAGE),
    ],
)
def test_sentence_selection_matches_hand_computed_scores(number, rule, power, ties, expected):
    data = made((PASSAGE, ASKED, "@entity1"))
    selected = questions.select_sentences(data, Selection(number, rule, power, ties))
    for split in selected.splits.values():
        assert spell(data, split.passages[0]) == expected
        assert spell(data, split.questions[0]) == ASKED
        assert questions.answers_kept(split) == float("@entity1" in expected)


def test_sentence_selection_does_not_depend_on_the_answer():
    chosen = [
        questions.select_sentences(
            made((PASSAGE, ASKED, answer)), Selection(2, "words", 1.0, "earlier")
        )
        for answer in ("@entity1", "@entity2", "rained")
    ]
    texts = {spell(data, data.splits["valid"].passages[0]) for data in chosen}
    assert len(texts) == 1


def test_repeated_words_of_a_sentence_count_once():
    data = made(("met met met . who met .", "who met", "who"))
    selected = questions.select_sentences(data, Selection(1, "words", 0.0, "earlier"))
    assert spell(data, selected.splits["train"].passages[0]) == "who met ."


def test_passage_without_sentence_ends_is_one_sentence():
    data = made(("a b c", "x", "a"))
    selected = questions.select_sentences(data, Selection(4, "words", 0.0, "earlier"))
    assert spell(data, selected.splits["train"].passages[0]) == "a b c"


def test_vocabulary_has_the_frequent_training_words():
    data = made(("b b b a a 17 17 once @entity7", "a @entity7 zz", "@entity7"))
    vocabulary = questions.make_vocabulary(data, min_count=2, join_numbers=True)
    assert vocabulary.words == ["<nil>", "<unk>", "<num>", "@entity7", "a", "b"]
    assert [vocabulary.words[i] for i in vocabulary.entities] == ["@entity7"]
    numbered = vocabulary.table[data.splits["valid"].passages[0]]
    assert spell(vocabulary, numbered) == "b b b a a <num> <num> <unk> @entity7"
    plain = questions.make_vocabulary(data, min_count=1, join_numbers=False)
    assert plain.words[3:] == ["@entity7", "a", "b", "17", "once", "zz"]


def test_words_absent_from_training_are_unknown():
    data = made(("b b new", "b", "b"))
    trained = data.splits["train"]
    without = np.where(trained.passages.words == data.words.index("new"), 0, trained.passages.words)
    splits = {
        **data.splits,
        "train": trained._replace(passages=Texts(without, trained.passages.ends)),
    }
    data = dataclasses.replace(data, splits=splits)
    vocabulary = questions.make_vocabulary(data, min_count=1, join_numbers=False)
    numbered = vocabulary.table[data.splits["valid"].passages[0]]
    assert spell(vocabulary, numbered) == "b b <unk>"


def test_invalid_datasets_and_subsets_raise():
    with pytest.raises(UserError, match=r"config\.dataset"):
        questions.check("bab", "")
    with pytest.raises(UserError, match=r"config\.subset"):
        questions.check("babi", "qa3")
    with pytest.raises(UserError, match=r"config\.subset"):
        questions.check("cnn", "qa1")
