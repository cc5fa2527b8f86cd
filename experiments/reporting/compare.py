"""Results of a run, or of several kinds of model side by side: a table and a picture."""

from pathlib import Path
from typing import Any

from absl import logging

from experiments.records.metrics import STATISTICS, read_metrics
from experiments.reporting import pictures
from experiments.runtime import markdown
from experiments.runtime.errors import UserError

PICTURE_NAME = "comparison.png"
LABELS = {
    "lstm": "LSTM",
    "bn_lstm": "BN-LSTM",
    "ln_lstm": "LN-LSTM",
    "bn_everywhere": "BN-everywhere",
    "bn_e_star": "BN-e*",
    "bn_e_star_star": "BN-e**",
}
LONG_DASHES = (0, (12, 3))
STYLES = {  # colour and dashes
    "lstm": ("tab:gray", "--"),
    "bn_lstm": ("tab:blue", "-"),
    "ln_lstm": ("tab:olive", "-."),
    "bn_everywhere": ("tab:orange", ":"),
    "bn_e_star": ("tab:green", "-."),
    "bn_e_star_star": ("tab:red", LONG_DASHES),
}


def results_table(results: list[dict[str, Any]]) -> str:
    """The results of `experiments.train`, a line for each model and way of evaluation."""
    names = results[0]["shown"]
    rows = results[0]["rows"]
    splits = list(dict.fromkeys(row["split"] for row in rows))
    readings = any("reading" in row for row in rows)
    header = ["model", "normalised by", *["read as"] * readings]
    header += [f"{s} {n}" for s in splits for n in names]
    lines = []
    for result in results:
        ways: dict[tuple[str, str], dict[str, Any]] = {}  # by statistics and reading, then by split
        for row in result["rows"]:
            way = row["statistics"], row.get("reading", "")
            ways.setdefault(way, {})[row["split"]] = row
        for (statistics, reading), by_split in ways.items():
            values = [
                f"{by_split[s][n]:.4f}" if s in by_split else "" for s in splits for n in names
            ]
            label = LABELS[result["kind"]]
            lines.append([label, STATISTICS[statistics], *[reading] * readings, *values])
    table = markdown.table(header, lines)
    chosen = ", ".join(
        f"{LABELS[r['kind']]} at update {r['update']:,} of {r['updates']:,}" for r in results
    )
    return (
        f"Data: {results[0]['data']}\n\n{table}\n"
        f"Best checkpoint by validation {results[0]['selection']}: {chosen}."
    )


def draw_curves(runs: dict[str, Path], data: str, metric: str, picture: Path) -> bool:
    """Draws training loss and a validation metric of runs, by kind of model, into a PNG.

    `data` is the name of the training data.

    Returns:
      Whether it drew them. Without matplotlib it does not, and logs a warning.
    """
    try:
        figure = pictures.new_figure(data, 9, 3.4)
    except UserError as error:
        logging.warning("no picture: %s", error)
        return False
    loss, validation = figure.subplots(1, 2)
    for kind, folder in runs.items():
        rows = read_metrics(folder)
        color, dashes = STYLES[kind]
        for axes, split, name in ((loss, "train", "loss"), (validation, "valid", metric)):
            points = [(r["update"], r[name]) for r in rows if r["split"] == split]
            style = {"color": color, "linestyle": dashes, "label": LABELS[kind]}
            axes.plot(*zip(*points, strict=True), **style)
    loss.set(xlabel="update", ylabel="training loss (nats)", ylim=(0, None))
    validation.set(xlabel="update", ylabel=f"validation {metric.replace('_', ' ')}")
    if metric in ("accuracy", "error"):
        validation.set_ylim(0, None)
    for axes in (loss, validation):
        pictures.tidy(axes)
    validation.legend(loc="best")
    pictures.save(figure, picture)
    return True
