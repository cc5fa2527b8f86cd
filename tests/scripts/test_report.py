import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from experiments.records.runs import Experiment
from experiments.reporting import items
from experiments.runtime.errors import UserError
from scripts import report
from tests.scripts.made_up import ODD, write_run
from tests.test_trust import Outline

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script>"
PNG = bytes(16) + (300).to_bytes(4) + bytes(4)  # 300 pixels wide


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of two runs, one of which goes on; and the text beside it."""
    folder = tmp_path_factory.mktemp("report") / ODD
    points = {500: {"accuracy": 0.5}, 1000: {"accuracy": 0.6}}
    finished = Experiment("pmnist", "bn_lstm")
    write_run(folder / "runs", finished, 1, points, {"accuracy": 0.7}, command=EVIL, machine=ODD)
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
    assert page[0].count("<img ") == 11  # not those whose run is not there


def test_every_item_has_its_place(page):
    for name, item in items.items("data").items():
        assert f'<h2 id="{name}">' in page[0] and f'href="#{name}"' in page[0]
        assert f"## {item.title}" in page[1]


def test_every_number_has_its_run(page):
    flat = re.sub(r" +", " ", page[1])
    assert "| pmnist/bn_lstm | 1 | 1,000 of 100,000 | 1:05 h | cpu (" in flat
    assert "| 012345678 | 2026-11-23 |" in flat
    assert "| pmnist/lstm | 1 | 500 of 100,000 | -, not finished |" in flat
    assert "Not drawn: no run here has come as far" in flat
    # 3,900 seconds for 1,000 updates.
    assert "pmnist BN-LSTM: 1,000 of 100,000 updates, 107:15 h more at its pace;" in flat
    assert "text8 LSTM: not run; text8 BN-LSTM: not run" in flat
    assert "`python -m scripts.reproduce table_text8 --budget=full`" in flat


def test_odd_names_read_as_they_are(page):
    """Of a machine, in tables, and of the folder of the data, in a sentence."""
    rendered = Outline(MarkdownIt("commonmark", {"html": False}).enable("table").render(page[1]))
    for shown in (Outline(page[0]), rendered):
        text = re.sub(r"\s+", " ", "".join(shown.text))
        assert text.count(f"cpu ({ODD})") == 4  # items that have the run
        assert f"/{ODD}/mnist. " in text
        assert "i" not in [element[0] for element in shown.elements]


@pytest.mark.parametrize("is_there", [True, False])
def test_without_data_the_committed_picture_is_shown(tmp_path, monkeypatch, is_there):
    def show(_):
        raise UserError("no data")

    monkeypatch.setattr(report, "COMMITTED", tmp_path / "a b")
    if is_there:
        report.COMMITTED.mkdir()
        (tmp_path / "a b" / "name.png").write_bytes(PNG)
        (tmp_path / "a b" / "name.md").write_text("# Title\n\n| t |\n|---|\n| 7 |\n\n![x](y.png)\n")
    item = items.Item("Title", show)
    page, text = report.section("name", item, {}, tmp_path / "page")
    assert ("Committed picture and table" in page) == is_there
    assert ("no data" in page) and ("no data" in text)
    assert ('<img width="192" alt="Title" src="data:image/png;base64,' in page) == is_there
    assert ("<td>7</td>" in page) == ("| 7 |" in text) == is_there
    assert ("![Title](../a%20b/name.png)" in text) == is_there


def test_the_summary_goes_into_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.into_readme(readme, "| new |")
    assert readme.read_text() == (f"before\n{report.BEGIN}\n\n| new |\n\n{report.END}\nafter\n")
    readme.write_text("nothing")
    with pytest.raises(UserError, match="has no place for the summary"):
        report.into_readme(readme, "| new |")


def test_the_summary_has_the_final_results(tmp_path):
    points = {500: {"accuracy": 0.6}, 1000: {"accuracy": 0.65}}
    write_run(tmp_path, Experiment("pmnist", "bn_lstm"), 1, points, {"accuracy": 0.7})
    known = items.items("data")
    table = re.sub(r" +", " ", report.summary(known, report.find(known, tmp_path)))
    row = "| pMNIST (released draw) | BN-LSTM | accuracy | 0.954 | 0.7000 | 1,000 of 100,000 | 1 |"
    assert row in table
    assert "| pMNIST (released draw) | LSTM | accuracy | 0.902 | - | not run | 0 |" in table
