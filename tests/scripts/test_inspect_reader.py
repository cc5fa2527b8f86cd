import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import babi
from experiments import train
from experiments.datasets import prepared
from experiments.datasets.question_arrays import Question, pack
from experiments.records import workdir
from experiments.records.checkpoints import Checkpoints, read_best
from experiments.runtime.errors import UserError
from experiments.tasks.question_answering import Task
from scripts import inspect_reader

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.inspect_reader"]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}
PEOPLE = {f"@entity{i}": name for i, name in enumerate(["Ann", "<b>Bo</b>", 'C & "D"', "Éva", "E"])}
NASTY = "<i>&amp;"  # a word, as it stands
RARE, NUMBER = "un'heard<", "1921"


def question(rng, name, *more):
    """Some random moves, then the words `more`."""
    people = rng.permutation(list(PEOPLE))[:3]
    passage = [w for p in people for w in (p, "met", rng.choice(list(PEOPLE)), NASTY, ".")]
    asked = ["@placeholder", "met", people[0], "?"]
    entities = [f"{entity}:{PEOPLE[entity]}" for entity in people[:2]]  # not of all of them
    return Question(name, [*passage, *more], asked, str(people[1]), entities)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs of two readers on questions made up; it is only read.

    The BN-LSTM's is finished, the LSTM's has a first checkpoint. The second validating question has
    too long a passage, so that it is left out.
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
    train.train(config, folder / "runs" / "bn_lstm")

    config.model.kind = "lstm"
    task, other = Task(config), folder / "runs" / "lstm"
    record = {"selection": "error", "lower_is_better": True}
    other.mkdir(parents=True)
    workdir.open_workdir(config, other, task.record | record, "xla")
    with Checkpoints(other, *record.values()) as checkpoints:
        state = train.create_state(task, config)
        params = jax.tree.map(lambda leaf: 8 * leaf, state.params)  # so that weights differ
        checkpoints.save(state.replace(params=params), {"error": 0.5})
    return folder / "runs"


@pytest.fixture
def finished(runs, tmp_path):
    """A copy of a run, to be spoilt and written into."""
    return Path(shutil.copytree(runs / "bn_lstm", tmp_path / "run"))


@pytest.fixture
def inspect(call_main):
    """Runs the command in this process: the page as it reads, and what is written."""

    def inspect(folder, example=0, split="valid", output=None, data_dir=None):
        given = {"example": example, "split": split, "output": output, "data_dir": data_dir}
        written = call_main(inspect_reader, workdir=str(folder), **given)
        page = Path(output or folder / f"attention_{split}_{example}.html")
        return Reading(page.read_text(encoding="utf-8")), written

    return inspect


class Reading(HTMLParser):
    """A page: elements with text and attributes, by the class or name of the one around them."""

    def __init__(self, page):
        super().__init__()
        self.page, self.open, self.found, self.tags = page, [], {}, set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        around = self.open[-1]["place"] if self.open else ""
        attributes = dict(attributes)
        place = tag if tag in ("h1", "title") else attributes.get("class") or around
        if tag in ("span", "li"):
            place = around
        element = {"tag": tag, "place": place, "text": "", **attributes}
        self.found.setdefault((around if tag in ("span", "li") else place, tag), []).append(element)
        if tag not in ("meta", "br"):
            self.open.append(element)
        for outer in self.open[:-1]:
            outer.setdefault("inside", []).append(element)

    def handle_endtag(self, tag):
        while self.open and self.open.pop()["tag"] != tag:
            pass

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def bars(self, place):
        """Words, shares and marks of a list, from its text."""
        rows = []
        for item in self.found[place, "li"]:
            values = [float(e["value"]) for e in item["inside"] if e["tag"] == "data"]
            (bar,) = [e["style"] for e in item["inside"] if e["tag"] == "i"]
            (shown,) = [e["text"] for e in item["inside"] if e["tag"] == "data"]
            (label,) = [e["text"] for e in item["inside"] if e["tag"] == "b"]
            assert abs(float(bar.removeprefix("width: ").rstrip("%")) - 100 * values[0]) < 0.02
            assert abs(float(shown.rstrip("%")) - 100 * values[0]) < 0.06
            marks = re.search(r"( in passage)?( right)?$", label)
            rows.append((label[: marks.start()], values[0], marks[0]))
        return rows


def raw_question(folder, split, example):
    """Passage, question and answer as words, and the name; and all words that the model knows."""
    task = Task(workdir.read_config(folder))
    part = task.splits[split]
    words = np.array(task.questions.words)
    vocabulary = task.vocabulary.words
    return (
        list(words[part.passages[example]]),
        list(words[part.questions[example]]),
        str(words[part.answers[example]]),
        vocabulary,
        task.model,
    )


def expected(folder, split, example, variables):
    """Attention and probabilities by the model itself, given the words without padding."""
    passage, asked, _, vocabulary, model = raw_question(folder, split, example)

    def numbers(words):
        read = ["<num>" if w.isdigit() else w if w in vocabulary else "<unk>" for w in words]
        return np.array([[vocabulary.index(w) for w in read]])

    @jax.jit
    def apply(*inputs):
        return model.apply(variables, *inputs, use_running_average=True, mutable=["intermediates"])

    lengths = np.array([len(passage)]), np.array([len(asked)])
    logits, sown = apply(numbers(passage), numbers(asked), *lengths)
    return np.asarray(sown["intermediates"]["attention"][0][0]), np.asarray(jax.nn.softmax(logits))[
        0
    ]


def names_of(entities):
    return lambda word: f"{word} {entities[word]}" if word in entities else word


CASES = [("bn_lstm", "valid", 1), ("bn_lstm", "test", 0), ("lstm", "test", 1)]


@pytest.mark.parametrize("kind, split, example", CASES)
def test_the_page_is_what_the_model_does(runs, inspect, tmp_path, kind, split, example):
    folder = runs / kind
    output = tmp_path / "page.html"
    page, written = inspect(folder, example, split, str(output))
    passage, asked, answer, vocabulary, _ = raw_question(folder, split, example)
    _, variables, which = read_best(folder)
    assert which == ("none" if kind == "lstm" else "population")
    attention, p = expected(folder, split, example, variables)

    # ---- The passage, with the names of two entities.
    named = names_of({entity: PEOPLE[entity] for entity in (passage[0], passage[5])})
    spans = page.found["passage", "span"]
    assert [span["text"] for span in spans] == [named(word) for word in passage]
    titles = [span["title"].split(", read as ") for span in spans]
    np.testing.assert_allclose([float(t[0]) for t in titles], attention, rtol=6e-4)
    assert len({t[0] for t in titles}) > 5
    shades = [float(span["style"].removeprefix("--a: ")) for span in spans]
    np.testing.assert_allclose(shades, attention / attention.max(), atol=2e-3)
    assert max(shades) == 1
    read = {RARE: ["<unk>"], NUMBER: ["<num>"]}
    assert [t[1:] for t in titles] == [read.get(word, []) for word in passage]
    for span, word in zip(spans, passage, strict=True):
        classes = ["unknown"] * (word in read) + ["answer"] * (word == answer)
        assert span["class"] == " ".join(classes)
    assert ("dotted line" in page.page) == (split == "test")

    # ---- The question.
    assert page.found["h1", "h1"][0]["text"] == " ".join(map(named, asked))
    assert "<mark>@placeholder</mark>" in page.page

    # ---- Answers and entities.
    best = np.argsort(-p)[:5]
    bars = page.bars("answers")
    assert [word for word, _, _ in bars] == [named(vocabulary[i]) for i in best]
    np.testing.assert_allclose([share for _, share, _ in bars], p[best], rtol=6e-4)
    for i, (_, _, marks) in zip(best, bars, strict=True):
        word = vocabulary[i]
        assert (" in passage" in marks) == (word in PEOPLE and word in passage)
        assert (" right" in marks) == (word == answer)
    sums = {w: sum(a for v, a in zip(passage, attention, strict=True) if v == w) for w in PEOPLE}
    most = sorted((w for w in PEOPLE if w in passage), key=sums.get, reverse=True)
    bars = page.bars("entities")
    assert [word for word, _, _ in bars] == [named(word) for word in most]
    np.testing.assert_allclose([s for _, s, _ in bars], [sums[w] for w in most], rtol=6e-4)
    assert [bool(marks) for _, _, marks in bars] == [word == answer for word in most]

    # ---- The truth.
    target = vocabulary.index(answer)
    right = p.argmax() == target
    truth = f"{'Right' if right else 'Wrong'}: the answer is {named(answer)}"
    if not right:
        rank = 1 + np.sum(p > p[target])
        truth += f", at place {rank} with probability {p[target]:.2g}"
    assert page.found["right" if right else "wrong", "b"][0]["text"] == truth

    # ---- What it is of.
    name = f"{split} & 2" if split == "valid" else f"{split} {example}"  # valid 1 is left out
    where = f"bAbI task 1, {split}, example {example}: {name}"
    how = {
        "lstm": "LSTM, update 0, no batch statistics",
        "bn_lstm": "BN-LSTM, update 20, population statistics, re-estimated",
    }[kind]
    assert page.found["title", "title"][0]["text"] == where
    assert [p["text"] for p in page.found["muted", "p"][:2]] == [where, how]

    # ---- The same in the terminal.
    lines = written.out.split("\n")
    assert lines[:4] == [where, how, "", " ".join(map(named, asked))]
    for line, i in zip(lines[4:9], best, strict=True):
        assert line.startswith(f"  {p[i]:6.1%}  {named(vocabulary[i])}")
    assert lines[9:] == [truth, "", f"Page: {output}", ""]
    assert written.err == ""


def test_right_answers_are_told_from_wrong_ones(runs):
    """By the model's own error, over all questions that it may answer."""
    folder = runs / "bn_lstm"
    task, (_, variables, _) = Task(workdir.read_config(folder)), read_best(folder)
    right = []
    for example in range(8):
        _, p = expected(folder, "train", example, variables)
        found = inspect_reader.inspect(task, variables, "train", example, {})
        answer = raw_question(folder, "train", example)[2]
        assert found.right == (task.vocabulary.words[p.argmax()] == answer)
        assert found.right == found.verdict.startswith("Right")
        right.append(found.right)
    assert 0 < sum(right) < len(right)  # so that it is a test


def test_an_answer_that_the_model_does_not_know(runs, inspect, tmp_path):
    page, written = inspect(runs / "lstm", 2, "test", str(tmp_path / "page.html"))
    verdict = f"Wrong: the answer is {RARE}, a word that the model does not know"
    assert page.found["wrong", "b"][0]["text"] == verdict and verdict in written.out


def test_an_answer_that_was_cut_away(runs):
    folder = runs / "lstm"
    task, (_, variables, _) = Task(workdir.read_config(folder)), read_best(folder)
    part = task.splits["valid"]
    answers = np.full_like(part.answers, task.questions.words.index("?"))
    task.splits["valid"] = part._replace(answers=answers)
    found = inspect_reader.inspect(task, variables, "valid", 0, {})
    assert found.verdict.endswith("; the passage as the model reads it lacks it")


def test_text_is_escaped_and_nothing_is_loaded(finished, inspect):
    page, _ = inspect(finished, 1)
    text = page.found["passage", "p"][0]["text"]
    assert NASTY in text and any(PEOPLE[entity] in text for entity in ("@entity1", "@entity2"))
    ours = "html meta title style header p h1 b mark main section h2 span br i aside small ol li"
    assert page.tags <= {*ours.split(), "data", "div"}
    assert page.page.count("<b") == len(re.findall(r'<b( class="(right|wrong)")?>|<br>', page.page))
    assert "<b>Bo" not in page.page and NASTY not in page.page
    assert not re.search(r"src=|href=|url\(|@import|https?:|<script", page.page)


def test_running_averages_where_there_is_nothing_better(finished, inspect):
    first, _ = inspect(finished)
    (finished / workdir.STATISTICS_NAME).unlink()
    second, written = inspect(finished)
    assert written.err == (
        "no re-estimated population statistics of update 20 yet: using the running average; to "
        f"have them: python -m experiments.main --mode=evaluate --workdir={finished}\n"
    )
    assert "update 20, population statistics, running average" in second.page
    attention, _ = expected(finished, "valid", 0, read_best(finished)[1])
    for page, same in ((first, False), (second, True)):
        shown = [float(span["title"]) for span in page.found["passage", "span"]]
        assert np.allclose(shown, attention, rtol=6e-4) == same


def test_texts_contrast_with_what_is_behind_them():
    """At least 4.5, as WCAG asks, in light and dark mode, at any attention."""
    style = inspect_reader.PAGE.template
    modes = [dict(re.findall(r"--(\w+): ([^;]+);", part)) for part in style.split("@media (pref")]
    assert len(modes) == 2

    def luminance(color):
        rgb = color.split() if " " in color else [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        c = np.array(rgb, float) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for mode in modes:
        pairs = [("text", "heat"), *((name, "ground") for name in ("text", "muted", "bar"))]
        for front, back in [*pairs, ("right", "ground"), ("wrong", "ground")]:
            a, b = luminance(mode[front]), luminance(mode[back])
            assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5, (front, back)


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_data_that_lie_elsewhere_now(finished, inspect, tmp_path):
    page, _ = inspect(finished)
    data_dir = json.loads((finished / "config.json").read_text())["data_dir"]
    change(finished / "config.json", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        inspect(finished)
    again, _ = inspect(finished, data_dir=data_dir)
    assert again.page == page.page


def test_a_folder_without_a_run_of_its_own(runs, tmp_path, inspect):
    with pytest.raises(UserError, match=f"--workdir={tmp_path}/no is not the folder of a run"):
        inspect(tmp_path / "no")
    with pytest.raises(UserError, match=f"choose {runs}/bn_lstm or {runs}/lstm$"):
        inspect(runs)


def test_a_run_of_another_task(finished, inspect):
    change(finished / "config.json", task="char_lm")
    with pytest.raises(UserError, match=r"--workdir=.* a run of the task char_lm: only .* attend"):
        inspect(finished)


def test_a_run_without_a_validated_checkpoint(finished, inspect):
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(UserError, match=r"--workdir=.* holds no validated checkpoint yet"):
        inspect(finished)


@pytest.mark.parametrize("split, example", [("valid", 3), ("test", 300)])
def test_a_question_that_is_not_there(runs, inspect, split, example):
    there = rf"--example={example}: bAbI task 1 has 3 {split} questions, from 0 to 2$"
    with pytest.raises(UserError, match=there):
        inspect(runs / "lstm", example, split)


def test_other_data_than_the_run_had(finished, inspect):
    change(finished / "run.json", dataset_sha256="0")
    with pytest.raises(UserError, match="there dataset_sha256 is '0'"):
        inspect(finished)
    assert not list(finished.glob("*.html*"))


def test_a_page_that_cannot_be_written(finished, inspect, tmp_path):
    with pytest.raises(UserError, match=rf"--output=.* written: there is no folder {tmp_path}/no"):
        inspect(finished, output=str(tmp_path / "no" / "page.html"))
    with pytest.raises(UserError, match=r"--output=\. cannot be written: it is a folder"):
        inspect(finished, output=".")
    with pytest.raises(UserError, match=r"--output=.* cannot be written: File name too long"):
        inspect(finished, output=str(tmp_path / ("x" * 254)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--example=1", "--split=dev"], "--split=dev: value should be one of <train|valid|test>"),
        (["--example=1"], "is not the folder of a run"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    command = [*COMMAND, f"--workdir={tmp_path}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
