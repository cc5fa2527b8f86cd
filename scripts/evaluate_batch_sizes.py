"""Evaluates a BN-LSTM with batch statistics of several batch sizes, and population statistics.

    python -m scripts.evaluate_batch_sizes --workdir=runs/pmnist_bn_lstm --batch_sizes=50,100,1000

Statistics of a small batch are noisy, which makes the model seem worse than it is. The table shows
by how much, on the validation split, for the best checkpoint so far. Population statistics are
re-estimated, as at the end of training.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments import evaluate, tasks, train
from experiments.evaluate import Variables
from experiments.records import runs
from experiments.records.metrics import STATISTICS
from experiments.runtime import cli, markdown, paths
from experiments.runtime.errors import UserError


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("workdir", None, "Folder of a BN-LSTM's run.", required=True)
    paths.DEFINE_path("data_dir", None, "Folder of the data; by default that of the run.")
    flags.DEFINE_list("batch_sizes", ["50", "100", "200", "500", "1000"], "Numbers of examples.")


def parse_sizes(words: Sequence[str], examples: int) -> list[int]:
    """The batch sizes.

    Raises:
      UserError: one of them is not a number from 2 to the number of examples.
    """
    for word in words:
        if not (word.isdecimal() and 2 <= int(word) <= examples):
            raise UserError(f"--batch_sizes has {word!r}: give numbers from 2 to {examples:,}")
    return [int(word) for word in words]


def rows_of(
    task: tasks.Task, config: ConfigDict, variables: Variables, sizes: list[int]
) -> Iterator[list[str]]:
    """The rows of the table: one for each batch size, and the last for population statistics."""
    reading = task.readings[0]
    _, noise = train.random_keys(config.seed)
    evaluator = evaluate.make_evaluator(task, noise)
    for size in sizes:
        title = f"evaluating in batches of {size:,}"
        metrics = evaluator(variables, reading, "valid", size, False, title)
        yield [STATISTICS["batch"], f"{size:,}", *(f"{metrics[m]:.4f}" for m in task.shown)]
    population = evaluate.population_statistics(task, config, variables, noise)
    variables = {**variables, "batch_stats": population}
    metrics = evaluator(variables, reading, "valid", config.eval_batch_size, True, "evaluating")
    yield [STATISTICS["population"], "any", *(f"{metrics[m]:.4f}" for m in task.shown)]


def main(_: list[str]) -> None:
    """Prints the table."""
    folder = Path(flags.FLAGS.workdir)
    run = runs.load(folder, flags.FLAGS.data_dir)
    if run.statistics == "none":
        raise UserError(f"--workdir={folder} is the run of a model without batch statistics")
    task = run.task
    examples = task.num_examples("valid", task.readings[0])
    sizes = parse_sizes(flags.FLAGS.batch_sizes, examples)
    rows = rows_of(task, run.config, run.variables, sizes)
    header = ["normalised by", "batch", *(f"valid {m.replace('_', ' ')}" for m in task.shown)]
    table = markdown.table(header, rows)
    print(f"{task.data}, update {run.update:,}, {examples:,} examples\n\n{table}")


if __name__ == "__main__":
    cli.run(main, define_flags)
