import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import babi
from experiments import train
from experiments.datasets import prepared
from experiments.datasets.question_arrays import PLACEHOLDER, Question, pack
from experiments.records import runs, workdir
from experiments.reporting import pages
from experiments.runtime.errors import UserError
from scripts import inspect_reader
from scripts.inspect_reader import IN_PASSAGE, RIGHT, Bar, Inspection, Word
from tests.test_trust import Outline

PEOPLE = {f"@entity{i}": name for i, name in enumerate(["Ann", "<b>Bo</b>", 'C & "D"', "Éva", "E"])}
RARE, NUMBER = "un'heard<", "1921"


def question(rng, name, *more):
    """A question on a passage of random meetings and the words `more`."""
    people = rng.permutation(list(PEOPLE))[:3]
    passage = [w for p in people for w in (p, "met", rng.choice(list(PEOPLE)), ".")]
    asked = [PLACEHOLDER, "met", people[0], "?"]
    entities = [f"{entity}:{PEOPLE[entity]}" for entity in people[:2]]  # others have no name
    return Question(name, [*passage, *more], asked, str(people[1]), entities)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of a reader on made-up questions; tests only read it.

    The second validation question is left out, because its passage is too long.
    """
    folder, rng = tmp_path_factory.mktemp("readers"), np.random.default_rng(0)
    splits = {
        "train": [question(rng, f"train {i}") for i in range(16)],
        "valid": [question(rng, f"valid & {i}", *[".", RARE] * (i == 1) * 8) for i in range(4)],
        "test": [question(rng, f"test {i}", RARE, NUMBER) for i in range(3)],
    }
    splits["test"][2] = splits["test"][2]._replace(answer=RARE)
    prepared.write(folder / "data/prepared/babi", pack(splits, "qa1_"), {}, {})
    config = babi.get_config("qa1")
    config.data_dir = str(folder / "data")
    config.num_updates = config.eval_every = config.checkpoint_every = config.log_every = 20
    config.batch_size = config.eval_batch_size = config.population_batch_size = 8
    config.sorted_batches = config.num_lengths = 1
    config.max_passage_length = 20
    config.model.kind = "bn_lstm"
    config.model.features = 8
    config.optimizer.learning_rate = 0.05
    train.train(config, folder / "run")
    return folder / "run"


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the run, which a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "run"))


@pytest.fixture
def call(call_main):
    """Runs the command in this process; returns the page and the output."""

    def call(folder, example=0, split="valid", output=None, data_dir=None):
        given = {"example": example, "split": split, "output": output, "data_dir": data_dir}
        printed = call_main(inspect_reader, workdir=str(folder), **given)
        page = Path(output or folder / f"attention_{split}_{example}.html")
        return page.read_text(encoding="utf-8"), printed

    return call


def words_of(task, split, example):
    """Passage, question and answer, in the words of the data."""
    part, words = task.splits[split], np.array(task.questions.words)
    return (
        list(words[part.passages[example]]),
        list(words[part.questions[example]]),
        str(words[part.answers[example]]),
    )


def expected(run, split, example):
    """The model's attention and probabilities, computed from the words without padding."""
    vocabulary = run.task.vocabulary.words
    *texts, _ = words_of(run.task, split, example)

    def numbers(words):
        read = ["<num>" if w.isdigit() else w if w in vocabulary else "<unk>" for w in words]
        return np.array([[vocabulary.index(w) for w in read]])

    @jax.jit
    def apply(*inputs):
        options = {"use_running_average": True, "mutable": ["intermediates"]}
        return run.model.apply(run.variables, *inputs, **options)

    lengths = [np.array([len(words)]) for words in texts]
    logits, sown = apply(*map(numbers, texts), *lengths)
    return np.asarray(sown["intermediates"]["attention"][0][0]), jax.nn.softmax(logits)[0]


@pytest.mark.parametrize("split, example", [("valid", 1), ("test", 0)])
def test_inspection_matches_the_model_outputs(folder, split, example):
    run = runs.load(folder)
    found = inspect_reader.inspect(run.task, run.variables, split, example, {})
    passage, asked, answer = words_of(run.task, split, example)
    attention, p = expected(run, split, example)
    vocabulary = run.task.vocabulary.words

    assert [word.text for word in found.passage] == passage
    assert [word.text for word in found.question] == asked
    assert found.answer == answer
    read = {RARE: "<unk>", NUMBER: "<num>"}
    assert [word.read for word in found.passage] == [read.get(word, word) for word in passage]
    np.testing.assert_allclose(found.attention, attention, rtol=1e-4)
    assert len(set(found.attention)) > 5

    best = np.argsort(-p)[:5]
    assert [bar.word for bar in found.answers] == [vocabulary[i] for i in best]
    np.testing.assert_allclose([bar.share for bar in found.answers], p[best], rtol=1e-4)
    for word, _, marks in found.answers:
        assert (IN_PASSAGE in marks) == (word in PEOPLE and word in passage)
        assert (RIGHT in marks) == (word == answer)
    sums = {w: sum(a for v, a in zip(passage, attention, strict=True) if v == w) for w in PEOPLE}
    most = sorted((w for w in PEOPLE if w in passage), key=sums.get, reverse=True)
    assert [bar.word for bar in found.entities] == most
    shares = [bar.share for bar in found.entities]
    np.testing.assert_allclose(shares, [sums[w] for w in most], rtol=1e-4)
    assert [bar.marks for bar in found.entities] == [[RIGHT] * (word == answer) for word in most]


def test_verdict_distinguishes_right_and_wrong_answers(folder):
    """On training questions, of which the model answers some right and some wrong."""
    run = runs.load(folder)
    right = []
    for example in range(8):
        _, p = expected(run, "train", example)
        answer = words_of(run.task, "train", example)[2]
        found = inspect_reader.inspect(run.task, run.variables, "train", example, {answer: "x"})
        target = run.task.vocabulary.words.index(answer)
        verdict = f"Right: the answer is {answer} x"
        if p.argmax() != target:
            rank = 1 + np.sum(p > p[target])
            verdict = f"Wrong: the answer is {answer} x, at rank {rank} with probability "
        assert found.verdict.startswith(verdict)
        assert found.right == (p.argmax() == target)
        right.append(found.right)
    assert 0 < sum(right) < len(right)  # both verdicts were tested


def test_verdict_explains_impossible_answers(folder):
    run = runs.load(folder)
    found = inspect_reader.inspect(run.task, run.variables, "test", 2, {})
    assert not found.right
    assert found.verdict == f"Wrong: the answer is {RARE}, a word outside the model's vocabulary"

    part = run.task.splits["valid"]
    answers = np.full_like(part.answers, run.task.questions.words.index("?"))
    run.task.splits["valid"] = part._replace(answers=answers)
    found = inspect_reader.inspect(run.task, run.variables, "valid", 0, {})
    assert found.verdict.endswith("; the answer is not in the passage that the model reads")


def test_page_shows_an_inspection():
    found = Inspection(
        passage=[Word("@entity1", "@entity1"), Word("met", "met"), Word("1921", "<num>")],
        question=[Word(PLACEHOLDER, PLACEHOLDER), Word("met", "met"), Word("@entity1", "@entity1")],
        answer="1921",
        attention=np.array([0.25, 0.5, 0.125], np.float32),
        answers=[Bar("@entity1", 0.625, [IN_PASSAGE]), Bar("1921", 0.25, [RIGHT])],
        entities=[Bar("@entity1", 0.25, [])],
        right=False,
        verdict="Wrong: it is 1921",
    )
    page = inspect_reader.make_page(found, {"@entity1": "Ann"}, "valid 3", "LSTM, update 2", 1234)
    shown = Outline(page)
    text = " ".join("".join(shown.text).split())
    assert f"valid 3 {PLACEHOLDER} met @entity1 Ann Wrong: it is 1921 LSTM, update 2" in text
    assert "Attention to the passage @entity1 Ann met 1921 0 0.5" in text
    assert "of 1,234 words @entity1 Ann in passage 62.5% 1921 right 25.0%" in text
    assert text.endswith("all mentions @entity1 Ann 25.0%")
    for value in ("--a: 0.500", "--a: 1.000", "--a: 0.250", "unknown answer"):
        assert shown.values.count(value) == 1, value
    assert "0.125, read as <num>" in shown.values and "width: 62.50%" in shown.values
    assert not re.search(r"src=|href=|url\(|@import|https?:|<script", page)


def test_command_writes_page_and_summary(copy, call):
    page, printed = call(copy, 1)
    where = "bAbI task 1, valid, example 1: valid & 2"  # 1 is left out
    how = "BN-LSTM, update 20, population statistics, re-estimated"
    assert where in "".join(Outline(page).text) and how in page
    assert printed.out.startswith(f"{where}\n{how}\n\n{PLACEHOLDER} met ")
    assert printed.out.endswith(f"\nPage: {copy}/attention_valid_1.html\n")
    assert printed.err == ""

    (copy / workdir.STATISTICS_NAME).unlink()
    page, printed = call(copy, 1)
    assert printed.err.startswith("no re-estimated population statistics of update 20 yet")
    assert f"--mode=evaluate --workdir={copy}\n" in printed.err
    assert "update 20, population statistics, running average" in page


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_data_dir_flag_overrides_the_config(copy, call, tmp_path):
    page, _ = call(copy)
    data_dir = json.loads((copy / "config.json").read_text())["data_dir"]
    change(copy / "config.json", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        call(copy)
    assert call(copy, data_dir=data_dir)[0] == page


def test_invalid_examples_and_other_tasks_raise(copy, call):
    with pytest.raises(UserError, match=r"--example=3: it must be from 0 to 2, .* valid questions"):
        call(copy, 3)
    change(copy / "config.json", task="char_lm")
    with pytest.raises(UserError, match=r"--workdir=.* question_answering"):
        call(copy)


@pytest.mark.parametrize("name", ["no/page.html", "."])
def test_unwritable_page_raises(folder, call, tmp_path, name):
    with pytest.raises(UserError, match=r"--output=.* cannot be written"):
        call(folder, output=str(tmp_path / name))


def test_text_colors_have_sufficient_contrast():
    """A contrast of at least 4.5, as WCAG requires, at any attention."""
    style = "".join(
        (pages.TEMPLATES / name).read_text() for name in ("page.html", "attention.html")
    )
    colors = dict(re.findall(r"--(\w+): ([^;]+);", style))

    def luminance(color):
        rgb = color.split() if " " in color else [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        c = np.array(rgb, float) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    pairs = [(colors[name], "#ffffff") for name in ("text", "muted", "link", "right", "wrong")]
    for pair in [*pairs, (colors["text"], colors["heat"])]:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
