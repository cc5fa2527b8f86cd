"""Shows a reader's attention and answers for one question, as an HTML page.

    python -m scripts.inspect_reader --workdir=runs/babi_1/bn_e_star --example=3

The page needs no network. It shows the best checkpoint so far, with re-estimated population
statistics if the run is finished. A run of several kinds of model has a folder for each kind.
"""

import collections
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.datasets.question_arrays import ENTITY, PLACEHOLDER, SPLITS
from experiments.datasets.questions import SPECIALS
from experiments.records import runs, workdir
from experiments.records.checkpoints import tell_statistics
from experiments.records.metrics import STATISTICS
from experiments.reporting import pages
from experiments.reporting.compare import LABELS
from experiments.runtime import cli, files, paths
from experiments.runtime.errors import UserError
from experiments.tasks.question_answering import Task

SHOWN = 5  # number of answers, and of entities
IN_PASSAGE, RIGHT = "in passage", "right"


class Word(NamedTuple):
    """A word of the data, and the word of the vocabulary that the model reads for it."""

    text: str
    read: str

    @property
    def unknown(self) -> bool:
        """Whether the model reads another word, such as <unk> or <num>."""
        return self.text != self.read


class Bar(NamedTuple):
    """A word, its probability or attention, and remarks."""

    word: str
    share: float
    marks: list[str]


class Inspection(NamedTuple):
    """A model's attention and answers for one question.

    Attributes:
      passage, question: their words.
      answer: the right one, a word of the data.
      attention: the weight of each word of the passage, float `[words]`.
      answers: the likeliest words of the model's vocabulary, the likeliest first.
      entities: the passage's entities with the most attention, summed over their mentions.
      right: whether the likeliest word is the answer.
      verdict: `right` in words, with the answer's probability if another word is likelier.
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
        "example", None, "Index of the question, from 0.", required=True, lower_bound=0
    )
    flags.DEFINE_enum("split", "valid", SPLITS, "Split of the question.")
    paths.DEFINE_path(
        "output", None, "Page to write, by default attention_SPLIT_N.html in the folder of the run."
    )
    paths.DEFINE_path("data_dir", None, "Folder of the data; by default that of the run.")


def predict(
    task: Task, variables: dict[str, Any], batch: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Attention to the words of the first passage in a batch, and log-probabilities of answers."""
    options: dict[str, Any] = {"use_running_average": True, "mutable": ["intermediates"]}
    apply = jax.jit(functools.partial(task.model.apply, **options))
    logits, sown = apply(variables, *task.inputs(batch))
    (attention,) = sown["intermediates"]["attention"]
    words = attention[0, : batch["passage_length"][0]]
    return np.asarray(words, np.float32), np.asarray(jax.nn.log_softmax(logits[0]))


def inspect(
    task: Task, variables: dict[str, Any], split: str, example: int, names: dict[str, str]
) -> Inspection:
    """Applies the model to one question of a split, with the statistics in `variables`."""
    part, vocabulary = task.splits[split], task.vocabulary
    batch = task.make_batch(split, np.array([example]), vocabulary.table)
    attention, log_p = predict(task, variables, batch)
    passage, question, (answer,) = (
        [Word(task.questions.words[i], vocabulary.words[vocabulary.table[i]]) for i in indices]
        for indices in (part.passages[example], part.questions[example], [part.answers[example]])
    )
    order = np.argsort(-log_p, kind="stable")
    likeliest = [(vocabulary.words[i], float(np.exp(log_p[i]))) for i in order[:SHOWN]]
    entities: collections.Counter[str] = collections.Counter()
    for word, weight in zip(passage, attention, strict=True):
        if ENTITY in word.text:
            entities[word.text] += float(weight)
    mentioned = {word.read for word in passage if ENTITY in word.read}

    target = int(batch["answer"][0])
    rank = 1 + int(np.flatnonzero(order == target)[0]) if target >= len(SPECIALS) else None
    verdict = f"{'Right' if rank == 1 else 'Wrong'}: the answer is {name_of(answer.text, names)}"
    if rank is None:
        verdict += ", a word outside the model's vocabulary"
    elif rank > 1:
        verdict += f", at rank {rank:,} with probability {np.exp(log_p[target]):.2g}"
    if answer not in passage:
        verdict += "; the answer is not in the passage that the model reads"
    return Inspection(
        passage,
        question,
        answer.text,
        attention,
        [
            Bar(w, p, [IN_PASSAGE] * (w in mentioned) + [RIGHT] * (w == answer.text))
            for w, p in likeliest
        ],
        [Bar(w, share, [RIGHT] * (w == answer.text)) for w, share in entities.most_common(SHOWN)],
        rank == 1,
        verdict,
    )


def name_of(word: str, names: dict[str, str]) -> str:
    """A word, and the name that it stands for, if known."""
    return f"{word} {names[word]}" if names.get(word) else word


def make_page(found: Inspection, names: dict[str, str], where: str, how: str, size: int) -> str:
    """The page. `where` names the question, `how` the model; `size` is the vocabulary's size."""
    return pages.render(
        "attention.html",
        found=found,
        names=names,
        where=where,
        how=how,
        size=size,
        weighed=list(zip(found.passage, found.attention, strict=True)),
        top=found.attention.max(initial=np.finfo(np.float32).tiny),
        placeholder=PLACEHOLDER,
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
    """Writes the page, and prints a summary and the page's path."""
    given = flags.FLAGS
    folder, split, example = Path(given.workdir), given.split, given.example
    config = workdir.read_config(folder)
    workdir.check_task(config, folder, "question_answering")
    record = workdir.read_record(folder)
    count = record["questions"][split]
    if example >= count:
        raise UserError(
            f"--example={example}: it must be from 0 to {count - 1}, for the {split} questions of "
            f"{record['dataset']}"
        )
    page = Path(given.output or folder / f"attention_{split}_{example}.html")
    paths.check_output(page)  # before data are loaded, which may take minutes
    run = runs.load(folder, given.data_dir)
    task, which = run.task, run.statistics
    tell_statistics(folder, run.update, which)

    name, names = task.questions.describe(split, task.splits[split].indices[example])
    found = inspect(task, run.variables, split, example, names)
    where = f"{task.data}, {split}, example {example:,}: {name}"
    how = f"{LABELS[config.model.kind]}, update {run.update:,}, {STATISTICS[which]}"
    html = make_page(found, names, where, how, len(task.vocabulary.words))
    files.write_text(page, html)
    print(f"{summary(found, names, where, how)}\nPage: {page}")


if __name__ == "__main__":
    cli.run(main, define_flags)
