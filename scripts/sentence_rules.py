"""How many answers survive when passages are cut to the sentences most like the question.

Usage: python -m scripts.sentence_rules --data_dir=FOLDER [--split=valid] [--number=4]

For each rule of choosing sentences, a line: the fields of configs/cnn_qa.py:four_sentences, the
share of questions whose answer is still in the passage, and the words that are left of a passage.
The rule of the paper was not released; it kept the answers of 57% of validation questions.
"""

import itertools

import numpy as np
from absl import flags

from experiments.datasets import questions
from experiments.datasets.question_arrays import SPLITS
from experiments.datasets.questions import SENTENCE_RULES, SENTENCE_TIES, Selection
from experiments.runtime import cli, markdown, paths

LENGTH_POWERS = (0.0, 0.5, 1.0)


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("data_dir", None, "Folder of the data, as for runs.", required=True)
    flags.DEFINE_enum("split", "valid", SPLITS, "Whose questions are counted.")
    flags.DEFINE_integer("number", 4, "Sentences that are kept.", lower_bound=1)


def main(_: list[str]) -> None:
    """Prints the table."""
    given = flags.FLAGS
    data = questions.load("cnn", given.data_dir)
    lines = []
    for rule, power, ties in itertools.product(SENTENCE_RULES, LENGTH_POWERS, SENTENCE_TIES):
        selection = Selection(given.number, rule, power, ties)
        part = questions.select_sentences(data, selection, (given.split,)).splits[given.split]
        kept, words = questions.answers_kept(part), np.mean(part.passages.lengths)
        lines.append((rule, str(power), ties, f"{kept:.1%}", f"{words:.0f}"))
    print(f"{data.name}, {len(part.answers):,} {given.split} questions, {given.number} sentences\n")
    header = ("sentence_rule", "sentence_length_power", "sentence_ties", "answers kept", "words")
    print(markdown.table(header, lines))


if __name__ == "__main__":
    cli.run(main, define_flags)
