"""Results of a sweep: a row for each run as CSV, and means over seeds as Markdown."""

import csv
import io
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from experiments.launching.sweeps import Point, argument
from experiments.records import workdir
from experiments.records.metrics import FINAL
from experiments.reporting.compare import LABELS
from experiments.runtime import files, markdown

CSV_NAME, MARKDOWN_NAME = "results.csv", "results.md"
SEED, KIND = "seed", "model.kind"
KEYS = ("split", "statistics", "reading")  # of rows in results.json; other columns are metrics
VALIDATION = ("batch", "none")  # statistics that normalise validation, which chooses checkpoints

Row = dict[str, Any]


def rows(points: list[Point], errors: dict[str, str], folder: Path) -> list[Row]:
    """A row for each run of a sweep in `folder`.

    `errors` are those of points that failed, by name. Metrics are named `test/population/accuracy`,
    or `test/population/one sequence/accuracy` if the reading has a name.
    """
    made = []
    for point in points:
        for kind, run in point.runs.items():
            fields = {field: value for field, value in point.fields.items() if field != KIND}
            results = point.results(kind)
            status = "failed" if point.name in errors else "unfinished"
            row = {**fields, "kind": kind, SEED: point.config.seed, "status": status}
            if results:
                row |= {"status": "finished", **_found(results)}
            made.append(row | {"workdir": str(run.relative_to(folder))})
    return made


def _found(results: Row) -> Row:
    """The columns of a finished run."""
    chosen = results["selection"]
    validation = next(
        row[chosen]
        for row in results["rows"]
        if row["split"] == "valid" and row["statistics"] in VALIDATION
    )
    found = {"selection": chosen, "validation": validation, "update": results["update"]}
    for row in results["rows"]:
        for metric, value in row.items():
            if metric not in KEYS:
                found[_column(row, metric)] = value
    return found


def _column(row: Row, metric: str) -> str:
    """The CSV column of a metric of a row of `results.json`."""
    return "/".join([*(row[key] for key in KEYS if key in row), metric])


def as_csv(table: list[Row]) -> str:
    """The rows as CSV; the workdir is the last column."""
    columns = dict.fromkeys(column for row in table for column in row)
    columns["workdir"] = columns.pop("workdir")
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: argument(value) for column, value in row.items()} for row in table)
    return file.getvalue()


def as_markdown(points: list[Point], table: list[Row], errors: dict[str, str]) -> str:
    """Means over seeds, best validation first, and the errors of failed points."""
    names = [field for field in points[0].fields if field not in (SEED, KIND)]
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in table:
        key = (LABELS[row["kind"]], *(argument(row[field]) for field in names))
        groups[key].append(row)
    columns = _shown(points)
    sign = 1 if _lower_is_better(points) else -1
    ranked = []
    for key, members in groups.items():
        done = [row for row in members if row["status"] == "finished"]
        cells = [_spread(done, sources) for sources in columns.values()]
        best = statistics.fmean(row["validation"] for row in done) if done else math.inf * sign
        ranked.append((sign * best, [*key, f"{len(done)} of {len(members)}", *cells]))
    ranked.sort(key=lambda each: each[0])
    lines = markdown.table(["model", *names, "seeds", *columns], [line for _, line in ranked])
    counts = Counter(row["status"] for row in table)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    text = (
        f"{lines}\n\n"
        f"{len(table)} runs: {told}. Mean ± sample standard deviation over seeds, of finished "
        "runs. Rows are sorted by validation, which also selects each run's checkpoint. Validation "
        "uses batch statistics, and test uses re-estimated population statistics; an LSTM has "
        "neither.\n"
    )
    for name, error in errors.items():
        text += f"\n- `{name}` failed: {markdown.escape(error)}"
    return text + "\n" * bool(errors)


def _shown(points: list[Point]) -> dict[str, set[str]]:
    """Metrics of the Markdown table by title, each with the CSV columns that may hold it."""
    columns: dict[str, set[str]] = {}
    for results in (point.results(kind) for point in points for kind in point.runs):
        if results is None:
            continue
        columns[f"valid {results['selection']}"] = {"validation"}
        for row in results["rows"]:
            if row["split"] == "test" and row["statistics"] in FINAL:
                reading = f", {row['reading']}" if "reading" in row else ""
                for metric in results["shown"]:
                    sources = columns.setdefault(f"test {metric}{reading}", set())
                    sources.add(_column(row, metric))
    return columns


def _lower_is_better(points: list[Point]) -> bool:
    """Whether the metric that chooses checkpoints is better if lower."""
    for point in points:
        for kind, run in point.runs.items():
            if point.results(kind) is not None:
                return workdir.read_record(run)["lower_is_better"]
    return True


def _spread(done: list[Row], sources: set[str]) -> str:
    """Mean and sample standard deviation of values, each in one of the `sources` columns."""
    found = [row[source] for row in done for source in sources & row.keys()]
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.4f}"
    return f"{mean} ± {statistics.stdev(found):.4f}" if len(found) > 1 else mean


def write(points: list[Point], errors: dict[str, str], folder: Path) -> str:
    """Writes both files into the sweep's folder; returns the Markdown."""
    table = rows(points, errors, folder)
    text = as_markdown(points, table, errors)
    files.write_text(folder / CSV_NAME, as_csv(table))
    files.write_text(folder / MARKDOWN_NAME, text)
    return text
