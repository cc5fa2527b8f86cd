"""Makes a page of all tables and figures of the paper, each beside the results measured here.

    python -m scripts.report                          # of the runs in results/runs
    python -m scripts.report --runs=runs/reproduce    # of your own, in progress too

The page is one file that needs no network. For each table or figure it lists the runs, with their
updates, wall time, machine, commit and command, and the runs that are still missing, with a command
to make them. A run in progress is shown up to its last written metrics. A Markdown file beside the
page has the same tables; `--readme` puts a summary of the final results into README.md.
"""

import base64
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments.records.runs import Experiment, Run
from experiments.reporting import pages, pictures
from experiments.reporting.compare import LABELS
from experiments.reporting.item import Found, Item, Shown, Table, duration, find, wall_time
from experiments.reporting.items import ITEMS
from experiments.reporting.results import OURS, ResultsTable
from experiments.runtime import cli, files, markdown, paths
from experiments.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "results" / "figures"
BEGIN, END = "<!-- python -m scripts.report --readme -->", "<!-- end of the report -->"


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("runs", str(ROOT / "results" / "runs"), "Folder of runs.")
    paths.DEFINE_path("output", "report.html", "Page to write.")
    paths.DEFINE_path("data_dir", "data", "Folder of the data, for figures without runs.")
    flags.DEFINE_boolean("readme", False, "Put the summary into README.md.")


class Section(NamedTuple):
    """The report's section on an item, in plain text.

    Attributes:
      name, title: of the item.
      notes: sentences before table and picture.
      table: of the item, if it has one.
      picture: the content of a PNG file, empty if there is none.
      runs: a row for each run.
      commands: the command that started each run.
      missing: experiments with fewer updates than the paper's.
      reproduce: the command that runs them.
    """

    name: str
    title: str
    notes: list[str]
    table: Table | None
    picture: bytes
    runs: Table
    commands: list[str]
    missing: str
    reproduce: str

    @property
    def picture_width(self) -> int:
        """The width in CSS pixels, 96 per inch."""
        return round(int.from_bytes(self.picture[16:20]) * 96 / pictures.DPI)

    @property
    def picture_source(self) -> str:
        """The picture as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"


def make_section(name: str, item: Item, found: Found, data_dir: str) -> Section:
    """Makes the section of an item, with a note if the item cannot be drawn."""
    notes = [item.remark] if item.remark else []
    shown, picture = Shown(), b""
    try:
        shown = item.show(found, data_dir)
    except UserError as error:
        notes.append(f"Not redrawn: {error}.")
        committed = COMMITTED / f"{name}.png"
        picture = committed.read_bytes() if committed.exists() else b""
    else:
        if shown == Shown():
            notes.append("Not drawn: no run here has the data that it needs yet.")
        if shown.figure is not None:
            picture = pictures.png(shown.figure)
    there = [(experiment, run) for experiment in item.experiments for run in found[experiment]]
    return Section(
        name,
        item.title,
        notes,
        shown.table,
        picture,
        Table(RUN_HEADER, [run_row(*each) for each in there]),
        [run.record["starts"][-1]["command"] for _, run in there],
        "; ".join(filter(None, (missing(e, found[e]) for e in item.experiments))),
        f"python -m scripts.reproduce {name} --budget=full",
    )


RUN_HEADER = ("run", "seed", "updates", "wall time", "machine", "commit", "date")


def run_row(experiment: Experiment, run: Run) -> list[str]:
    """The row of a run under `RUN_HEADER`."""
    start = run.record["starts"][-1]
    machine = "; ".join([start["machine"], *run.implementations])
    return [
        str(experiment),
        str(run.config.seed),
        f"{run.updates:,} of {experiment.get_config().num_updates:,}",
        wall_time(run) if run.is_evaluated else f"{wall_time(run)}, not finished",
        f"{', '.join(sorted(set(start['devices'])))} ({machine})",
        (start["commit"] or "-")[:9],
        start["started"][:10],
    ]


def missing(experiment: Experiment, runs: list[Run]) -> str:
    """The progress of an experiment's runs; empty if one has as many updates as the paper's."""
    whole = experiment.get_config().num_updates
    furthest = max((run.updates for run in runs), default=0)
    if furthest >= whole:
        return ""
    fields = "".join(f", {key} {value}" for key, value in experiment.fields)
    far = f"{furthest:,} of {whole:,} updates" if runs else "not run"
    paces = [run.seconds / run.updates for run in runs if run.seconds and run.updates]
    if paces:
        far += f", {duration(round(min(paces) * (whole - furthest)))} left at its pace"
    return f"{experiment.config} {LABELS[experiment.kind]}{fields}: {far}"


def as_markdown(section: Section) -> str:
    """A section in Markdown, without its picture and commands."""
    parts = [f"## {markdown.escape(section.title)}", *map(markdown.escape, section.notes)]
    if section.table:
        parts.append(markdown.table(*section.table))
    if section.runs.rows:
        parts.append(markdown.table(*section.runs))
    if section.missing:
        short = markdown.escape(section.missing)
        parts.append(f"Fewer updates than the paper: {short}. `{section.reproduce}`")
    return "\n\n".join(parts)


def summary(found: Found) -> str:
    """All tables of final results as one table, for README.md."""
    rows = [
        [task, model, item.metric_name, *rest]
        for item in ITEMS.values()
        if isinstance(item, ResultsTable)
        for task, model, *rest in item.rows(found)
    ]
    return markdown.table(["task", "model", "test", "paper", *OURS], rows)


def into_readme(readme: Path, table: str) -> None:
    """Puts the summary between `BEGIN` and `END`.

    Raises:
      UserError: a mark is missing.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme} lacks the markers of the summary: {BEGIN} and {END}")
    files.write_text(readme, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def main(_: list[str]) -> None:
    """Writes the page and the Markdown file, and prints their paths."""
    given = flags.FLAGS
    folder, page = Path(given.runs), Path(given.output)
    if not folder.is_dir():
        raise UserError(f"--runs={folder} is not a folder")
    if page.suffix == ".md":
        raise UserError(f"--output={page} is the name of the Markdown file: use .html")
    paths.check_output(page)
    found = find(ITEMS.values(), folder)
    sections = [make_section(n, item, found, given.data_dir) for n, item in ITEMS.items()]
    texts = ["# The paper's results and ours", *map(as_markdown, sections)]
    files.write_text(page, pages.render("report.html", sections=sections))
    files.write_text(page.with_suffix(".md"), "\n\n".join(texts) + "\n")
    if given.readme:
        into_readme(ROOT / "README.md", summary(found))
    print(f"{sum(map(len, found.values()))} runs: {page}, {page.with_suffix('.md')}")


if __name__ == "__main__":
    cli.run(main, define_flags)
