import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.runs import Experiment
from scripts import paper_items, report
from tests.scripts.made_up import write_run

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of two runs, one of which goes on; and the text beside it."""
    folder = tmp_path_factory.mktemp("report")
    points = {500: {"accuracy": 0.5}, 1000: {"accuracy": 0.6}}
    finished = Experiment("pmnist", "bn_lstm")
    write_run(folder / "runs", finished, 1, points, {"accuracy": 0.7}, command=EVIL)
    write_run(folder / "runs", Experiment("pmnist", "lstm"), 1, {500: {"accuracy": 0.3}})
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.report", f"--runs={folder / 'runs'}"),
            *(f"--output={folder / 'page.html'}", f"--data_dir={folder}"),
        ],
        cwd=ROOT,
        env={"PATH": "", "http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 runs: ")
    return (folder / "page.html").read_text(), (folder / "page.md").read_text()


def test_the_page_needs_nothing_but_itself(page):
    class Outside(HTMLParser):
        found = ()

        def handle_starttag(self, tag, attrs):
            self.found += tuple(
                value
                for name, value in attrs
                if name in ("src", "href") and not value.startswith(("#", "data:image/png;base64,"))
            )
            assert tag not in ("script", "link", "iframe")

    parser = Outside()
    parser.feed(page[0])
    assert parser.found == ()
    assert "&lt;script&gt;" in page[0]
    assert page[0].count("<img ") == 10  # not those whose data, or run, are not there


def test_every_item_has_its_place(page):
    for name, item in paper_items.items("data").items():
        assert f'<h2 id="{name}">' in page[0] and f'href="#{name}"' in page[0]
        assert f"## {item.title}" in page[1]


def test_every_number_has_its_run(page):
    flat = re.sub(r" +", " ", page[1])
    assert "| pmnist/bn_lstm | 1 | 1,000 of 100,000 | 1:05 h | cpu (x86_64, 2 cores) |" in flat
    assert "| 012345678 | 2026-11-23 |" in flat
    assert "| pmnist/lstm | 1 | 500 of 100,000 | -, not finished |" in flat
    assert "Not drawn: no run here has come as far" in flat
    # 3,900 seconds for 1,000 updates.
    assert "pmnist BN-LSTM: 1,000 of 100,000 updates, 107:15 h more at its pace;" in flat
    assert "text8 LSTM: not run; text8 BN-LSTM: not run" in flat
    assert "`python -m scripts.reproduce table_text8 --budget=full`" in flat


def test_the_summary_goes_into_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.into_readme(readme, "| new |")
    assert readme.read_text() == (f"before\n{report.BEGIN}\n\n| new |\n\n{report.END}\nafter\n")
    readme.write_text("nothing")
    with pytest.raises(UserError, match="has no place for the summary"):
        report.into_readme(readme, "| new |")


def test_the_readme_says_what_the_runs_do():
    known = paper_items.items("data")
    table = report.summary(known, report.find(known, ROOT / "results" / "runs"))
    assert table in (ROOT / "README.md").read_text(), "call python -m scripts.report --readme"
