"""Shows what a reader attends to, and what it answers: one question, as a page of HTML.

    python -m scripts.inspect_reader --workdir=runs/babi_1/bn_e_star --example=3

The page needs no network. It is of the best checkpoint so far, with re-estimated population
statistics where the run is finished. A run that trained several kinds of model has a folder for
each.
"""

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.datasets.question_arrays import ENTITY, PLACEHOLDER, SPLITS
from experiments.datasets.questions import SPECIALS
from experiments.records import runs, workdir
from experiments.records.metrics import STATISTICS
from experiments.reporting.compare import LABELS
from experiments.runtime import cli, files, paths
from experiments.runtime.errors import UserError
from experiments.tasks.question_answering import Task

SHOWN = 5  # answers, and entities
IN_PASSAGE, RIGHT = "in passage", "right"

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$where</title>
<style>
:root {
  color-scheme: light dark;
  --ground: #ffffff; --text: #1b1f24; --muted: #57606a; --line: #d8dee4; --bar: #0969da;
  --right: #1a7f37; --wrong: #b3261e; --heat: 255 166 43;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #12161b; --text: #e9edf1; --muted: #9aa4ae; --line: #30363d; --bar: #58a6ff;
    --right: #56d364; --wrong: #ff8a80; --heat: 150 76 0;
  }
}
body {
  max-width: 72rem; margin: 0 auto; padding: 2rem 1.5rem;
  background: var(--ground); color: var(--text); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere;
}
main { display: grid; grid-template-columns: minmax(0, 1fr) 20rem; gap: 0 3rem; }
@media (max-width: 48rem) { main { grid-template-columns: minmax(0, 1fr); } }
h1 { margin: .75rem 0; font-size: 1.6rem; font-weight: 600; line-height: 1.35; }
h2 { margin: 2rem 0 .5rem; font-size: 1rem; font-weight: 600; }
p { margin: 0; }
small, .muted { color: var(--muted); font-size: .85rem; font-weight: 400; }
h1 small { font-size: 1rem; }
mark { padding: 0 .3em; border-radius: .25em; background: var(--bar); color: var(--ground); }
.passage { font-size: 1.125rem; line-height: 1.9; }
.passage span {
  padding: .1em .15em; border-radius: .2em; background: rgb(var(--heat) / var(--a));
  -webkit-box-decoration-break: clone; box-decoration-break: clone;
}
.passage .answer { box-shadow: 0 .15em var(--right); }
.passage small { color: inherit; font-size: .7em; }
.unknown { text-decoration: underline dotted; text-underline-offset: .2em; }
.scale { display: inline-block; width: 6rem; height: .7em; margin: 0 .3em; border-radius: .2em;
  background: linear-gradient(to right, rgb(var(--heat) / 0), rgb(var(--heat))); }
.right { color: var(--right); font-weight: 600; } .wrong { color: var(--wrong); }
ol { margin: 0; padding: 0; list-style: none; }
li { display: grid; grid-template-columns: 1fr auto; margin-bottom: .6rem; }
li b { font-weight: 500; }
li data { font-variant-numeric: tabular-nums; }
li div { grid-column: 1 / -1; height: .35rem; border-radius: .2rem; background: var(--line); }
li i { display: block; height: 100%; border-radius: inherit; background: var(--bar); }
</style>
<header>
<p class="muted">$where</p>
<h1>$question</h1>
<p><b class="$kind">$verdict</b></p>
<p class="muted">$how</p>
</header>
<main>
<section>
<h2>Attention to the passage</h2>
<p class="passage">
$passage
</p>
<p class="muted">0 <i class="scale"></i> $top<br>$legend</p>
</section>
<aside>
<h2>Best answers <small>of $size words</small></h2>
<ol class="answers">
$answers
</ol>
<h2>Attention by entity <small>all mentions</small></h2>
<ol class="entities">
$entities
</ol>
</aside>
</main>
</html>
""")


class Word(NamedTuple):
    """A word of the data, and what the model reads in its place."""

    text: str
    read: str


class Bar(NamedTuple):
    """A word, its share of something, and what is to be said of it."""

    word: str
    share: float
    marks: list[str]


class Inspection(NamedTuple):
    """What a model does with a question.

    Attributes:
      passage, question: their words.
      answer: the right one, a word of the data.
      attention: the weight of each word of the passage, float `[words]`.
      answers: the likeliest words of the model's vocabulary, the likeliest first.
      entities: those of the passage to which most attention is paid, summed over their mentions.
      right: whether the likeliest word is the answer.
      verdict: that in words, with how likely the answer was if it is another word.
    """

    passage: list[Word]
    question: list[Word]
    answer: str
    attention: np.ndarray
    answers: list[Bar]
    entities: list[Bar]
    right: bool
    verdict: str


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("workdir", None, "Folder of a reader's run.", required=True)
    flags.DEFINE_integer(
        "example", None, "Number of the question, from 0 on.", required=True, lower_bound=0
    )
    flags.DEFINE_enum("split", "valid", SPLITS, "Where the question is from.")
    paths.DEFINE_path(
        "output", None, "Page to write, by default attention_SPLIT_N.html in the folder of the run."
    )
    paths.DEFINE_path("data_dir", None, "Folder of the data, if not the one of training.")


def inspect(
    task: Task, variables: dict[str, Any], split: str, example: int, names: dict[str, str]
) -> Inspection:
    """Applies the model to one question of a split, with the statistics among its variables."""
    part, vocabulary = task.splits[split], task.vocabulary
    batch = task.make_batch(split, np.array([example]), vocabulary.table)

    @jax.jit
    def apply(variables: dict[str, Any], *inputs: np.ndarray) -> tuple[jax.Array, dict[str, Any]]:
        return task.model.apply(
            variables, *inputs, use_running_average=True, mutable=["intermediates"]
        )

    logits, sown = apply(variables, *task.inputs(batch))
    (attention,) = sown["intermediates"]["attention"]
    attention = np.asarray(attention[0, : batch["passage_length"][0]], np.float32)
    p = np.asarray(jax.nn.softmax(logits[0]))
    order = np.argsort(-np.asarray(logits[0]), kind="stable")

    def words(indices: Sequence[int]) -> list[Word]:
        return [
            Word(task.questions.words[i], vocabulary.words[vocabulary.table[i]]) for i in indices
        ]

    passage, (answer,) = words(part.passages[example]), words([part.answers[example]])
    target = int(batch["answer"][0])
    known = target >= len(SPECIALS)
    inside = {word.read for word in passage if ENTITY in word.read}
    sums: dict[str, float] = {}
    for word, weight in zip(passage, attention, strict=True):
        if ENTITY in word.text:
            sums[word.text] = sums.get(word.text, 0.0) + float(weight)

    def bar(word: str, share: float, *marks: str) -> Bar:
        return Bar(word, share, [*marks, *[RIGHT] * (word == answer.text)])

    likeliest = ((vocabulary.words[i], float(p[i])) for i in order[:SHOWN])
    most = sorted(sums, key=sums.get, reverse=True)[:SHOWN]
    right = known and target == order[0]
    verdict = f"{'Right' if right else 'Wrong'}: the answer is {name_of(answer.text, names)}"
    if not known:
        verdict += ", a word that the model does not know"
    elif not right:
        rank = 1 + int(np.flatnonzero(order == target)[0])
        verdict += f", at place {rank:,} with probability {p[target]:.2g}"
    if answer not in passage:
        verdict += "; the passage as the model reads it lacks it"
    return Inspection(
        passage,
        words(part.questions[example]),
        answer.text,
        attention,
        [bar(word, share, *[IN_PASSAGE] * (word in inside)) for word, share in likeliest],
        [bar(word, sums[word]) for word in most],
        right,
        verdict,
    )


def name_of(word: str, names: dict[str, str]) -> str:
    """A word, and who or what it stands for where that is known."""
    return f"{word} {names[word]}" if names.get(word) else word


def make_page(found: Inspection, names: dict[str, str], where: str, how: str, size: int) -> str:
    """The page. `where` and `how` tell question and model, `size` is that of the vocabulary."""

    def show(word: str) -> str:
        if word == PLACEHOLDER:
            return f"<mark>{word}</mark>"
        if names.get(word):
            return f"<small>{escape(word)}</small> {escape(names[word])}"
        return escape(word)

    def mark(mark: str) -> str:
        return f' <small class="{mark.replace(" ", "-")}">{mark}</small>'

    def bars(bars: list[Bar]) -> str:
        return "\n".join(
            f"<li><b>{show(word)}{''.join(map(mark, marks))}</b>"
            f'<data value="{share:.4g}">{share:.1%}</data>'
            f'<div><i style="width: {share:.2%}"></i></div></li>'
            for word, share, marks in bars
        )

    def unknown(word: Word) -> list[str]:
        return ["unknown"] * (word.text != word.read)

    def weighed(word: Word, weight: float) -> str:
        kinds = " ".join([*unknown(word), *["answer"] * (word.text == found.answer)])
        title = f"{weight:.4g}{f', read as {word.read}' if unknown(word) else ''}"
        return (
            f'<span class="{kinds}" style="--a: {weight / top:.3f}" title="{escape(title)}">'
            f"{show(word.text)}</span>"
        )

    top = found.attention.max(initial=np.finfo(np.float32).tiny)
    passage = "\n".join(map(weighed, found.passage, found.attention))
    question = " ".join(
        f'<span class="{"".join(unknown(word))}">{show(word.text)}</span>'
        for word in found.question
    )
    legend = []
    if any(word.text == found.answer for word in found.passage):
        legend.append("green line: the answer")
    if any(map(unknown, found.passage + found.question)):
        legend.append("dotted line: a word that the model does not know")
    return PAGE.substitute(
        where=escape(where),
        how=escape(how),
        kind="right" if found.right else "wrong",
        verdict=escape(found.verdict),
        question=question,
        passage=passage,
        top=f"{top:.4g}",
        legend="; ".join(legend),
        size=f"{size:,}",
        answers=bars(found.answers),
        entities=bars(found.entities),
    )


def summary(found: Inspection, names: dict[str, str], where: str, how: str) -> str:
    """The question and its answers, for the terminal."""
    question = " ".join(name_of(word.text, names) for word in found.question)
    answers = [
        f"  {share:6.1%}  {', '.join([name_of(word, names), *marks])}"
        for word, share, marks in found.answers
    ]
    return "\n".join([where, how, "", question, *answers, found.verdict, ""])


def main(_: list[str]) -> None:
    """Writes the page, prints a summary, and says where the page is."""
    given = flags.FLAGS
    folder, split, example = Path(given.workdir), given.split, given.example
    config = workdir.read_config(folder)
    if config.task != "question_answering":
        raise UserError(
            f"--workdir={folder} holds a run of the task {config.task}: "
            "only models of the task question_answering attend to words"
        )
    record = workdir.read_record(folder)
    count = record["questions"][split]
    if example >= count:
        raise UserError(
            f"--example={example}: {record['dataset']} has {count:,} {split} questions, "
            f"from 0 to {count - 1}"
        )
    page = Path(given.output or folder / f"attention_{split}_{example}.html")
    if page.is_dir() or not page.parent.is_dir():  # before data are loaded, which may take minutes
        problem = "it is a folder" if page.is_dir() else f"there is no folder {page.parent}"
        raise UserError(f"--output={page} cannot be written: {problem}")
    run = runs.load(folder, given.data_dir)
    task, which = run.task, run.statistics
    if which == "running":
        print(
            f"no re-estimated population statistics of update {run.update} yet: using the running "
            f"average; to have them: python -m experiments.main --mode=evaluate --workdir={folder}",
            file=sys.stderr,
        )

    name, names = task.questions.describe(split, task.splits[split].indices[example])
    found = inspect(task, run.variables, split, example, names)
    where = f"{task.data}, {split}, example {example:,}: {name}"
    how = f"{LABELS[config.model.kind]}, update {run.update:,}, {STATISTICS[which]}"
    try:
        with files.replacing(page) as temporary:
            html = make_page(found, names, where, how, len(task.vocabulary.words))
            temporary.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={page} cannot be written: {error.strerror}") from error
    sys.stdout.reconfigure(errors="replace")  # where the terminal lacks a character
    print(f"{summary(found, names, where, how)}\nPage: {page}")


if __name__ == "__main__":
    cli.run(main, define_flags)
