"""The paper's tables and figures: which runs each needs, and how it is drawn beside the paper's.

scripts/reproduce.py makes one of them, scripts/report.py a page of all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import datasets
from experiments.config import READER_KINDS
from experiments.datasets import Dataset
from experiments.records import workdir
from experiments.records.metrics import STATISTICS
from experiments.records.runs import Experiment, Run
from experiments.reporting import paper, pictures, untrained
from experiments.reporting.compare import LABELS, STYLES
from experiments.reporting.curves import (
    PAPER_STYLE,
    Found,
    Line,
    curves_by_hours,
    learning_curves,
    spread,
)
from experiments.reporting.statistics_figure import draw_statistics, find_statistics
from experiments.runtime import markdown
from experiments.tasks.sequential_images import pixel_order

KINDS = ("lstm", "bn_lstm")
FIGURE_GAMMAS = (0.1, 0.3, 0.5, 0.7, 1.0)
LENGTHS = tuple(range(100, 1001, 100))
HOURS = "Not in the paper: whether normalisation is worth its time. Machines are those of the runs."
LONG_DASHES = (0, (12, 3))
DASHES = {
    "lstm": "--",
    "bn_lstm": "-",
    "bn_everywhere": ":",
    "bn_e_star": "-.",
    "bn_e_star_star": LONG_DASHES,
}
# Of an experiment on a CPU, in a few minutes; elsewhere and later, the same command goes on.
MINUTES = {"mnist": 500, "pmnist": 500, "ptb": 100, "text8": 10, "cnn_qa": 100}


@dataclasses.dataclass(frozen=True)
class Item:
    """A table or a figure.

    Attributes:
      title: what it is, in a line.
      show: makes it of the runs that were found: a Markdown table or nothing, a figure or nothing.
      experiments: whose runs it needs.
      evaluation: fields that their final evaluation needs.
      remark: what a reader has to know of it.
    """

    title: str
    show: Callable[[Found], tuple[str, Any]]
    experiments: tuple[Experiment, ...] = ()
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    remark: str = ""


# ---- What is told of runs.


def how_far(runs: list[Run], experiment: Experiment) -> str:
    """`2,000 of 100,000`, of the run that came least far; nothing where there are none."""
    if not runs:
        return "not run"
    return f"{min(run.updates for run in runs):,} of {experiment.get_config().num_updates:,}"


def test_values(runs: list[Run], metric: str, reading: str | None = None) -> list[float]:
    """The final test results: with re-estimated statistics where there are any."""
    values = []
    for run in runs:
        rows = [row for row in run.results.get("rows", []) if row["split"] == "test"]
        rows = [row for row in rows if row["statistics"] in ("population", "none")]
        if reading is not None:
            rows = [row for row in rows if row.get("reading") == reading]
        values += [row[metric] for row in rows[:1]]
    return values


def results_table(metric: str, reading: str | None, configs: dict[str, str]) -> Callable:
    """Makes a table of final test results beside the paper's."""

    digits = 2 if metric == "bits_per_character" else 3  # that the paper gives

    def show(found: Found) -> tuple[str, None]:
        rows = []
        for experiment, runs in found.items():
            finished = [run for run in runs if test_values([run], metric, reading)]
            rows.append(
                [
                    configs[experiment.config],
                    LABELS[experiment.kind],
                    f"{paper.TABLES[experiment.config][experiment.kind]:.{digits}f}",
                    spread(test_values(runs, metric, reading)),
                    how_far(finished, experiment),
                    str(len(finished)),
                ]
            )
        header = ["task", "model", f"paper, test {metric.replace('_', ' ')}"]
        return markdown.table([*header, "here", "measured at update", "seeds"], rows), None

    return show


# ---- Lines of learning curves.


def lines_of(name: str, config: str, metric: str) -> list[Line]:
    """Lines of validation for LSTM and BN-LSTM, of a file whose first column says which it is."""
    published = paper.curves(name)
    return [validation_line(config, kind, metric, published[(kind,)]) for kind in KINDS]


def reader_lines(name: str, config: str, kinds: tuple[str, ...]) -> list[Line]:
    """Lines of validation by reader. The paper counts thousands of updates from 0, at the first."""
    published = paper.curves(name)
    updates = {kind: published[(kind, "valid")] * [[1000], [1]] + [[1000], [0]] for kind in kinds}
    return [validation_line(config, kind, "error", updates[kind]) for kind in kinds]


def validation_line(config: str, kind: str, metric: str, published: np.ndarray) -> Line:
    """The line of a kind of model."""
    style = LABELS[kind], STYLES[kind][0], DASHES[kind]
    return Line(Experiment(config, kind), *style, "valid", metric, published)


def gamma_lines(name: str, config: str, metric: str, split: str) -> list[Line]:
    """Lines of BN-LSTMs by initial gamma."""
    published = paper.curves(name)
    dashes = ("-", "--", "-.", ":", LONG_DASHES)
    return [
        Line(
            gamma_experiment(config, gamma),
            f"gamma {gamma}",
            color,
            dash,
            split,
            metric,
            published[(str(gamma), split)],
        )
        for gamma, color, dash in zip(
            FIGURE_GAMMAS,
            ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"),
            dashes,
            strict=True,
        )
    ]


def gamma_experiment(config: str, gamma: float) -> Experiment:
    """The BN-LSTM with an initial gamma, which the config has at 0.1."""
    fields = () if gamma == 0.1 else (("model.initial_scale", gamma),)
    return Experiment(config, "bn_lstm", fields)


# ---- Figures of other kinds.


def gradient_norms(
    data: Dataset,
    gammas: tuple[float, ...] = untrained.GAMMAS,
    draws: int = 20,
    order: str = "released_draw",
) -> dict[float, np.ndarray]:
    """`untrained.gradient_norms` for draws of weights and of a batch of 100, `[draws, time]`.

    The paper names no order of pixels. In the one that its released code draws for permuted MNIST,
    gradients agree with its lines; row by row (`in_order`) they do not, as a test shows.
    """
    import jax

    images, labels = data.arrays["train_images"], data.arrays["train_labels"]
    pixels_read = pixel_order(order, images.shape[1], 1)
    found: dict[float, np.ndarray] = {}
    for gamma in gammas:
        lines = []
        for draw in range(draws):
            rows = np.random.default_rng(draw).permutation(len(images))[:100]
            pixels = images[rows][:, pixels_read] / np.float32(255)
            chosen = labels[rows].astype(np.int32)
            key = jax.random.key(draw)
            lines.append(untrained.gradient_norms(pixels, chosen, gamma, key))
        found[gamma] = np.stack(lines)
    return found


def show_gradient_norms(data_dir: str) -> Callable:
    """Makes the figure of gradients by time step, and a table of some of them."""

    def show(_: Found) -> tuple[str, Any]:
        norms = gradient_norms(datasets.load("mnist", data_dir))
        published = paper.curves("tanh_rnn_gradient_norm")
        title = r"$\|\partial L / \partial h_t\|$ of a normalised tanh RNN, untrained"
        figure = pictures.new_figure(title, 11, 5, math=True)
        panels = figure.subplots(2, 5, sharex=True, sharey=True)
        rows = []
        for axes, (gamma, draws) in zip(panels.flat, norms.items(), strict=True):
            curve = published[(str(gamma),)]
            steps = np.arange(draws.shape[1])
            low, middle, high = np.maximum(np.quantile(draws, (0, 0.5, 1), axis=0), 1e-45)
            axes.fill_between(steps, low, high, color="tab:blue", alpha=0.25, linewidth=0)
            axes.plot(steps, middle, color="tab:blue", linewidth=2)
            axes.plot(*curve, **PAPER_STYLE)
            axes.set_title(f"gamma {gamma}", fontsize="small")
            pictures.tidy(axes)
            for step in (783, 600, 300):
                theirs = paper.at(curve, step)
                # What is below float32's range is 0.
                ours = [f"{v[step]:.1e}" if v[step] > 1e-44 else "0" for v in (middle, low, high)]
                rows.append(
                    [str(gamma), str(step), "-" if np.isnan(theirs) else f"{theirs:.1e}", *ours]
                )
        panels[0, 0].set(xlim=(0, 800), ylim=(1e-26, 10), yscale="log")
        for axes in panels[1]:
            axes.set_xlabel("time step t")
        header = ["gamma", "t", "paper", "here, median", "lowest", "highest"]
        return markdown.table(header, rows), figure

    return show


def show_tanh(_: Found) -> tuple[str, Any]:
    """Makes the figure of the derivative of tanh."""
    stddevs = np.linspace(0, 1, 1000)
    mean, lower, upper = untrained.tanh_derivative(stddevs, seed=0)
    figure = pictures.new_figure("Derivative of tanh at Gaussian inputs", 5, 3.6)
    axes = figure.subplots()
    axes.plot(stddevs, mean, color="tab:blue", linewidth=1.5, label="mean of 1,000 samples")
    axes.fill_between(stddevs, lower, upper, color="tab:blue", alpha=0.25, label="25% to 75%")
    axes.plot(*paper.TANH_MEANS, "k.", label="the paper's mean")
    quartiles = np.array(paper.TANH_QUARTILES).T
    for values in quartiles[1:]:
        axes.plot(quartiles[0], values, "kx", label="the paper's quartiles")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:4], labels[:4], fontsize="small")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="standard deviation", ylabel="derivative")
    pictures.tidy(axes)
    found, _, _ = untrained.tanh_derivative(paper.TANH_MEANS[0], seed=0, samples=100_000)
    rows = [
        [f"{stddev:.1f}", f"{theirs:.3f}", f"{ours:.3f}"]
        for stddev, theirs, ours in zip(*paper.TANH_MEANS, found, strict=True)
    ]
    return markdown.table(["standard deviation", "paper, mean", "here"], rows), figure


def show_lengths(found: Found) -> tuple[str, Any]:
    """Makes the figure of bits per character by length of segments."""
    figure = pictures.new_figure("Penn Treebank, test, by length of segments", 6, 4)
    axes = figure.subplots()
    ways = {  # by the paper's name of the line
        "lstm": ("lstm", "none", "LSTM", "--"),
        "bn_lstm_population_statistics": ("bn_lstm", "population", "BN-LSTM, population", "-"),
        "bn_lstm_batch_statistics": ("bn_lstm", "batch", "BN-LSTM, batch statistics", ":"),
    }
    published = paper.curves("ptb_test_bpc_by_length")
    rows = []
    for name, (kind, statistics, label, dashes) in ways.items():
        axes.plot(*published[(name,)], linestyle=dashes, **PAPER_STYLE)
        by_length: dict[int, list[float]] = {}
        for experiment, runs in found.items():
            for row in (row for run in runs for row in run.results.get("rows", [])):
                length = row.get("reading", "").removeprefix("segments of ")
                way = experiment.kind, row["statistics"], row["split"]
                if way == (kind, statistics, "test") and length.isdigit():
                    by_length.setdefault(int(length), []).append(row["bits_per_character"])
        lengths = sorted(by_length)
        if lengths:
            values = [np.mean(by_length[length]) for length in lengths]
            style = {"color": STYLES[kind][0], "linestyle": dashes, "linewidth": 2}
            axes.plot(lengths, values, marker="o", label=label, **style)
        for length, theirs in published[(name,)].T:
            ours = spread(by_length.get(int(length), []))
            rows.append([label, f"{length:.0f}", f"{theirs:.4f}", ours])
    axes.plot([], [], label="thin: the paper's", **PAPER_STYLE)
    axes.legend(fontsize="small")
    axes.set(xlabel="characters", ylabel="bits per character")
    pictures.tidy(axes)
    return markdown.table(["line", "length", "paper", "here"], rows), figure


def show_statistics(found: Found) -> tuple[str, Any]:
    """Makes the figure of population statistics by time step, of the run that came furthest."""
    for run in sorted((r for runs in found.values() for r in runs), key=lambda r: -r.updates):
        update = run.results.get("update")
        statistics = update and workdir.read_statistics(run.folder, update)
        if statistics:
            _, values = min(find_statistics(statistics).items())
            title = f"Penn Treebank, BN-LSTM, update {update:,}\n{STATISTICS['population']}"
            return "", draw_statistics(values, units=30, steps=49, title=title)
    return "", None


# ---- All of them.


def items(data_dir: str) -> dict[str, Item]:
    """The tables and figures by name, in the paper's order; `data_dir` is where data lie."""

    def both(*configs: str) -> tuple[Experiment, ...]:
        return tuple(Experiment(config, kind) for config in configs for kind in KINDS)

    def of_lines(*groups: list[Line]) -> tuple[Experiment, ...]:
        return tuple(dict.fromkeys(line.experiment for lines in groups for line in lines))

    mnist = lines_of("mnist_valid_accuracy", "mnist", "accuracy")
    pmnist = lines_of("pmnist_valid_accuracy", "pmnist", "accuracy")
    ptb = lines_of("ptb_valid_bpc", "ptb", "bits_per_character")
    pmnist_gamma = {
        f"{label} cross-entropy (nats)": gamma_lines(
            "pmnist_gamma_cross_entropy", "pmnist", "loss", split
        )
        for split, label in (("train", "training"), ("valid", "validation"))
    }
    ptb_gamma = {
        f"{label} bits per character": gamma_lines(
            "ptb_gamma_bpc", "ptb", "bits_per_character", split
        )
        for split, label in (("train", "training"), ("valid", "validation"))
    }
    sentences = reader_lines("cnn_4sentence_error", "cnn_qa:four_sentences", READER_KINDS)
    full = reader_lines("cnn_full_error", "cnn_qa", ("lstm", "bn_e_star_star"))
    return {
        "figure_gradient_norm": Item(
            "Gradient norm by time step for ten gammas, tanh RNN at initialisation",
            show_gradient_norms(data_dir),
            remark="Permuted MNIST in the released code's order. Thick: median of 20 draws of "
            "weights and batch; band: from lowest to highest; thin: the paper's one draw.",
        ),
        "figure_tanh": Item("Derivative of tanh by deviation of its input", show_tanh),
        "table_mnist": Item(
            "Sequential and permuted MNIST, test accuracy",
            results_table("accuracy", None, {"mnist": "MNIST", "pmnist": "pMNIST (released draw)"}),
            both("mnist", "pmnist"),
        ),
        "figure_mnist": Item(
            "Sequential MNIST, validation accuracy",
            learning_curves("Sequential MNIST", {"validation accuracy": mnist}, 100_000, (0, 1)),
            of_lines(mnist),
        ),
        "figure_pmnist": Item(
            "Permuted MNIST, validation accuracy",
            learning_curves(
                "Permuted MNIST (released draw)", {"validation accuracy": pmnist}, 100_000, (0, 1)
            ),
            of_lines(pmnist),
        ),
        "figure_pmnist_hours": Item(
            "Permuted MNIST, validation accuracy by hours of training",
            curves_by_hours("Permuted MNIST (released draw)", "validation accuracy", pmnist),
            of_lines(pmnist),
            remark=HOURS,
        ),
        "table_ptb": Item(
            "Penn Treebank by characters, test bits per character of one sequence",
            results_table("bits_per_character", "one sequence", {"ptb": "Penn Treebank"}),
            both("ptb"),
        ),
        "figure_ptb": Item(
            "Penn Treebank, validation bits per character",
            learning_curves(
                "Penn Treebank", {"validation bits per character": ptb}, 16_000, (1.4, 2.4)
            ),
            of_lines(ptb),
        ),
        "figure_ptb_hours": Item(
            "Penn Treebank, validation bits per character by hours of training",
            curves_by_hours("Penn Treebank", "validation bits per character", ptb),
            of_lines(ptb),
            remark=HOURS,
        ),
        "figure_ptb_lengths": Item(
            "Penn Treebank, test bits per character by length of segments",
            show_lengths,
            both("ptb"),
            evaluation={"eval_lengths": LENGTHS},
        ),
        "table_text8": Item(
            "text8, test bits per character of one sequence",
            results_table("bits_per_character", "one sequence", {"text8": "text8"}),
            both("text8"),
        ),
        "table_cnn": Item(
            "CNN questions, test error",
            results_table("error", None, {"cnn_qa": "CNN"}),
            tuple(Experiment("cnn_qa", kind) for kind in ("lstm", "bn_e_star_star")),
        ),
        "figure_cnn_four_sentences": Item(
            "CNN questions on four sentences, validation error",
            learning_curves(
                "CNN, four sentences", {"validation error": sentences}, 800_000, (0.3, 1)
            ),
            of_lines(sentences),
        ),
        "figure_cnn": Item(
            "CNN questions, validation error",
            learning_curves("CNN", {"validation error": full}, 400_000, (0.1, 1)),
            of_lines(full),
        ),
        "figure_population_statistics": Item(
            "Population statistics by time step",
            show_statistics,
            (Experiment("ptb", "bn_lstm"),),
            remark="The paper's, of a run on segments of 50: variance of the recurrent term 0 at "
            "the first step, 0.11 to 1.85 at the second, 0.18 to 1.01 at the last; all is steady "
            "after 10 to 15 steps.",
        ),
        "figure_gamma_pmnist": Item(
            "Initial gamma on permuted MNIST",
            learning_curves("Permuted MNIST, BN-LSTM by gamma", pmnist_gamma, 50_000, (0, 2.5)),
            of_lines(*pmnist_gamma.values()),
        ),
        "figure_gamma_ptb": Item(
            "Initial gamma on Penn Treebank",
            learning_curves("Penn Treebank, BN-LSTM by gamma", ptb_gamma, 13_200, (1.1, 1.7)),
            of_lines(*ptb_gamma.values()),
            remark="The paper's axes, which have nats over updates that are too many by 1 / ln 2, "
            "are corrected here.",
        ),
    }
