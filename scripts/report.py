"""Makes a page of all tables and figures of the paper, each beside what was measured here.

    python -m scripts.report                          # of the runs in results/runs
    python -m scripts.report --runs=runs/reproduce    # of one's own, in progress too

The page is one file that needs no network. It has every run: how far it came, how long that took,
on which machine, at which commit, by which command; and what has not been run yet, with the command
for it. A run in progress is shown as far as it has written metrics. Beside the page is a Markdown
file with the same tables; `--readme` puts its summary into README.md.
"""

import base64
import os
import urllib.parse
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from absl import flags

from experiments.records import runs
from experiments.records.runs import Experiment, Run
from experiments.reporting import pictures
from experiments.reporting.compare import LABELS
from experiments.reporting.curves import Found
from experiments.reporting.items import Item, items
from experiments.runtime import cli, files, markdown, paths
from experiments.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "results" / "figures"
BEGIN, END = "<!-- python -m scripts.report --readme -->", "<!-- end of the report -->"

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Recurrent batch normalization: the paper and here</title>
<style>
:root { color-scheme: light; --text: #1b1f24; --muted: #57606a; --line: #d8dee4; --link: #0969da; }
body { max-width: 64rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; background: #fff;
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; font-weight: 600; line-height: 1.3; }
h2 { margin: 3rem 0 .5rem; font-size: 1.2rem; font-weight: 600; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
nav { columns: 2 22rem; margin: 1.5rem 0; } nav a { display: block; }
img { max-width: 100%; height: auto; margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-weight: 600; } td { white-space: nowrap; }
small, .muted { color: var(--muted); font-size: .875rem; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--muted); }
code { font-size: .8125rem; overflow-wrap: anywhere; }
</style>
<h1>Recurrent batch normalization: the paper, and what was measured here</h1>
<p>Every table and figure of Cooijmans et al., "Recurrent Batch Normalization" (ICLR 2017). Thin
black lines and the columns named "paper" are the paper's; all other numbers were measured by the
runs that are listed below each.</p>
<nav>$contents</nav>
$sections
</html>
""")


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("runs", str(ROOT / "results" / "runs"), "Folder with runs in it.")
    paths.DEFINE_path("output", "report.html", "Page to write.")
    paths.DEFINE_path("data_dir", "data", "Folder of the data, for figures without runs.")
    flags.DEFINE_boolean("readme", False, "Put the summary into README.md.")


# ---- What is told of runs.


def run_row(experiment: Experiment, run: Run) -> list[str]:
    """A run in a line: what, how far, how long, where and when."""
    start = run.record["starts"][-1]
    seconds = "-" if run.seconds is None else duration(run.seconds)
    machine = f"{', '.join(sorted(set(start['devices'])))} ({start['machine']})"
    return [
        str(experiment),
        str(run.config.seed),
        f"{run.updates:,} of {experiment.get_config().num_updates:,}",
        seconds if run.results else f"{seconds}, not finished",
        machine,
        (start["commit"] or "-")[:9],
        start["started"][:10],
    ]


RUN_HEADER = ["run", "seed", "updates", "wall time", "machine", "commit", "date"]


def duration(seconds: int) -> str:
    """Hours and minutes: `1:05 h`."""
    return f"{seconds // 3600:,}:{seconds % 3600 // 60:02} h"


def find(known: dict[str, Item], folder: Path) -> Found:
    """The runs of all items' experiments that are in a folder."""
    every = runs.find(folder)
    experiments = {e: None for item in known.values() for e in item.experiments}
    return {e: runs.of(e, every) for e in experiments}


def missing(name: str, item: Item, found: Found) -> list[str]:
    """What is not there as the paper has it, and the command that would make it."""
    short = []
    for experiment, there in found.items():
        whole = experiment.get_config().num_updates
        furthest = max((run.updates for run in there), default=0)
        if furthest < whole:
            far = f"{furthest:,} of {whole:,} updates" if there else "not run"
            paces = [run.seconds / run.updates for run in there if run.seconds and run.updates]
            if paces:
                far += f", {duration(round(min(paces) * (whole - furthest)))} more at its pace"
            fields = "".join(f", {key} {value}" for key, value in experiment.fields)
            short.append(f"{experiment.config} {LABELS[experiment.kind]}{fields}: {far}")
    if short:
        short.append(f"python -m scripts.reproduce {name} --budget=full")
    return short


def summary(known: dict[str, Item], found: Found) -> str:
    """The tables of final results as one, for README."""
    lines: list[list[str]] = []
    header: list[str] = []
    for name, item in known.items():
        if name.startswith("table_"):
            table, _ = item.show({e: found[e] for e in item.experiments})
            head, *rows = markdown.cells(table)
            metric = head[2].removeprefix("paper, test ").strip()
            header = ["task", "model", "test", "paper", *head[3:]]
            lines += [[row[0], row[1], metric, *row[2:]] for row in rows]
    return markdown.table(header, lines)


class Content(NamedTuple):
    """What there is of an item.

    Attributes:
      table: in Markdown; empty if there is none.
      png: the picture, as the content of a file; empty if there is none.
      note: what is missing, and why.
      committed: the file of the picture, if it was not drawn anew.
    """

    table: str = ""
    png: bytes = b""
    note: str = ""
    committed: Path | None = None


def content(name: str, item: Item, found: Found) -> Content:
    """Table and picture of an item; those in `results/figures` where its data are not there."""
    try:
        table, figure = item.show(found)
    except UserError as error:
        picture, text = COMMITTED / f"{name}.png", COMMITTED / f"{name}.md"
        if not (picture.exists() and text.exists()):
            return Content(note=f"Not drawn: {error}.")
        lines = text.read_text(encoding="utf-8").splitlines()
        table = "\n".join(line for line in lines if line.startswith("|"))
        note = f"Committed picture and table, from results/figures; not made anew: {error}."
        return Content(table, picture.read_bytes(), note, picture)
    if figure is not None:
        return Content(table, pictures.png(figure))
    if table:
        return Content(table)
    return Content(note="Not drawn: no run here has come as far, and kept what it needs.")


# ---- The page.


def html_table(table: str) -> str:
    """A Markdown table in HTML."""
    head, *rows = markdown.cells(table)
    parts = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    parts += [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    ]
    return f'<div class="wide"><table>{"".join(parts)}</table></div>'


def html_image(png: bytes, title: str) -> str:
    """A picture of `pictures.DPI` within the page."""
    encoded = base64.b64encode(png).decode()
    pixels = int.from_bytes(png[16:20])  # more than the width in CSS's, of which an inch has 96
    width = round(96 / pictures.DPI * pixels)
    source = f"data:image/png;base64,{encoded}"
    return f'<img width="{width}" alt="{escape(title)}" src="{source}">'


def section(name: str, item: Item, found: Found, folder: Path) -> tuple[str, str]:
    """An item as HTML and as Markdown, for a file in a folder."""
    found = {e: found[e] for e in item.experiments}
    page = [f'<h2 id="{name}">{escape(item.title)}</h2>']
    text = [f"## {item.title}"]
    table, png, note, picture = content(name, item, found)
    for line in filter(None, (item.remark, note)):
        page.append(f"<p>{escape(line)}</p>")
        text.append(markdown.escape(line))
    if png:
        page.append(html_image(png, item.title))
    if picture is not None:
        link = urllib.parse.quote(os.path.relpath(picture, folder))
        text.append(f"![{item.title}]({link})")
    if table:
        page.append(html_table(table))
        text.append(table)
    there = [(e, run) for e, of_it in found.items() for run in of_it]
    if there:
        rows = [map(markdown.escape, run_row(*each)) for each in there]
        listed = markdown.table(RUN_HEADER, rows)
        commands = "".join(
            f"<p><code>{escape(run.record['starts'][-1]['command'])}</code></p>" for _, run in there
        )
        page.append(
            f"<details><summary>{len(there)} runs</summary>{html_table(listed)}{commands}</details>"
        )
        text.append(listed)
    if short := missing(name, item, found):
        *what, command = short
        page.append(
            f'<p class="muted">Not as far as the paper: {escape("; ".join(what))}. '
            f"<code>{escape(command)}</code></p>"
        )
        text.append(f"Not as far as the paper: {'; '.join(what)}. `{command}`")
    return "\n".join(page), "\n\n".join(text)


def into_readme(readme: Path, table: str) -> None:
    """Puts the summary between its marks.

    Raises:
      UserError: the marks are not there.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme} has no place for the summary: {BEGIN} and {END}")
    files.write_text(readme, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def main(_: list[str]) -> None:
    """Writes the page, and says where it is."""
    given = flags.FLAGS
    folder, page = Path(given.runs), Path(given.output)
    if not folder.is_dir():
        raise UserError(f"--runs={folder} is not a folder")
    known = items(given.data_dir)
    found = find(known, folder)
    sections = {name: section(name, item, found, page.parent) for name, item in known.items()}
    contents = "".join(f'<a href="#{n}">{escape(i.title)}</a>' for n, i in known.items())
    html = PAGE.substitute(
        contents=contents, sections="\n".join(page for page, _ in sections.values())
    )
    texts = ["# The paper, and what was measured here", *(text for _, text in sections.values())]
    try:
        files.write_text(page, html)
        files.write_text(page.with_suffix(".md"), "\n\n".join(texts) + "\n")
    except OSError as error:
        raise UserError(f"--output={page} cannot be written: {error.strerror}") from error
    if given.readme:
        into_readme(ROOT / "README.md", summary(known, found))
    print(f"{sum(map(len, found.values()))} runs: {page}, {page.with_suffix('.md')}")


if __name__ == "__main__":
    cli.run(main, define_flags)
