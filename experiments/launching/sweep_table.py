"""What a sweep came to: a row for each run as CSV, and means over seeds as Markdown."""

import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any

from experiments.launching.sweeps import Point, argument
from experiments.records import workdir
from experiments.reporting.compare import LABELS
from experiments.runtime import files, markdown

CSV_NAME, MARKDOWN_NAME = "results.csv", "results.md"
SEED, KIND = "seed", "model.kind"
VALIDATION = ("batch", "none")  # how validation normalises, that chooses checkpoints
FINAL = ("population", "none")  # how final numbers do

Row = dict[str, Any]


def rows(points: list[Point], statuses: dict[str, str], folder: Path) -> list[Row]:
    """A row for each run.

    `statuses` are those of unfinished points, by name. Metrics are named as
    `test/population/accuracy`, or `test/population/one sequence/accuracy` where the reading has a
    name. Workdirs are relative to the sweep's `folder`.
    """
    made = []
    for point in points:
        for kind, run in point.runs.items():
            fields = {field: value for field, value in point.fields.items() if field != KIND}
            results = point.results(kind)
            status = "finished" if results else statuses.get(point.name, "waiting")
            row = {**fields, "kind": kind, SEED: point.config.seed, "status": status}
            if results:
                chosen = results["selection"]
                found = {
                    "/".join((*_way(r), metric)): value
                    for r in results["rows"]
                    for metric, value in r.items()
                    if metric not in ("split", "statistics", "reading")
                }
                row |= {
                    "selection": chosen,
                    "validation": _first(results, "valid", VALIDATION)[chosen],
                    "update": results["update"],
                    **found,
                }
            made.append(row | {"workdir": str(run.relative_to(folder))})
    return made


def _way(row: Row) -> list[str]:
    return [row[key] for key in ("split", "statistics", "reading") if key in row]


def _first(results: Row, split: str, ways: tuple[str, ...]) -> Row:
    return next(r for r in results["rows"] if r["split"] == split and r["statistics"] in ways)


def as_csv(table: list[Row]) -> str:
    """The rows; columns are in the order in which they come up, and the workdir is the last."""
    columns = dict.fromkeys(column for row in table for column in row)
    columns["workdir"] = columns.pop("workdir")
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: argument(value) for column, value in row.items()} for row in table)
    return file.getvalue()


def as_markdown(points: list[Point], table: list[Row], errors: dict[str, str]) -> str:
    """Means over seeds, the best by validation first, then what is missing and why."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    names = [field for field in points[0].fields if field not in (SEED, KIND)]
    for row in table:
        key = (LABELS[row["kind"]], *(argument(row[field]) for field in names))
        groups.setdefault(key, []).append(row)
    shown = _shown(points)
    finished = [row for row in table if row["status"] == "finished"]
    selection = finished[0]["selection"] if finished else "metric"
    header = ["model", *names, "seeds", f"valid {selection}", *(title for title, _ in shown)]
    ranked, lines = [], []
    sign = 1 if _lower_is_better(points) else -1
    for key, members in groups.items():
        there = [row for row in members if row["status"] == "finished"]
        cells = [_spread([row["validation"] for row in there])]
        for _, columns in shown:
            cells.append(_spread([row[c] for row in there for c in columns if c in row]))
        line = [*key, f"{len(there)} of {len(members)}", *cells]
        best = statistics.fmean(row["validation"] for row in there) if there else math.inf * sign
        ranked.append((sign * best, line))
    lines = [line for _, line in sorted(ranked, key=lambda each: each[0])]
    counts = {
        status: sum(row["status"] == status for row in table)
        for status in dict.fromkeys(row["status"] for row in table)
    }
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    text = (
        f"{markdown.table(header, lines)}\n\n"
        f"Runs: {len(table)}, of which {told}. Mean ± sample standard deviation over seeds, of "
        "finished runs alone. Validation, by which rows are sorted and each run's checkpoint was "
        "chosen, normalises with batch statistics, test with re-estimated population statistics; "
        "an LSTM has neither.\n"
    )
    for name, error in errors.items():
        text += f"\n- `{name}` failed: {markdown.escape(error)}"
    return text + "\n" * bool(errors)


def _shown(points: list[Point]) -> list[tuple[str, list[str]]]:
    """The test columns: titles, and which columns of rows they are of, whatever normalises."""
    titles: dict[str, list[str]] = {}
    for point in points:
        for kind in point.runs:
            results = point.results(kind)
            for row in results["rows"] if results else ():
                if row["split"] != "test" or row["statistics"] not in FINAL:
                    continue
                for metric in results["shown"]:
                    reading = f", {row['reading']}" if "reading" in row else ""
                    columns = titles.setdefault(f"test {metric}{reading}", [])
                    column = "/".join((*_way(row), metric))
                    if column not in columns:
                        columns.append(column)
    return list(titles.items())


def _lower_is_better(points: list[Point]) -> bool:
    """Which way the metric goes that chooses checkpoints; any way while no run is finished."""
    for point in points:
        for kind, run in point.runs.items():
            if point.results(kind) is not None:
                return workdir.read_record(run)["lower_is_better"]
    return True


def _spread(found: list[float]) -> str:
    """Mean and sample standard deviation, which needs two."""
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.4f}"
    return f"{mean} ± {statistics.stdev(found):.4f}" if len(found) > 1 else mean


def write(
    points: list[Point], statuses: dict[str, str], errors: dict[str, str], folder: Path
) -> str:
    """Writes both files into the sweep's folder; returns the Markdown."""
    table = rows(points, statuses, folder)
    text = as_markdown(points, table, errors)
    files.write_text(folder / CSV_NAME, as_csv(table))
    files.write_text(folder / MARKDOWN_NAME, text)
    return text
