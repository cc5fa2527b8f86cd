import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt

from experiments.records.runs import Experiment
from experiments.reporting import item
from experiments.reporting.items import ITEMS
from experiments.runtime.errors import UserError
from scripts import report
from tests.scripts.made_up import ODD, write_run
from tests.test_trust import Outline

EVIL = "<script>alert(1)</script>"
PNG = bytes(16) + (300).to_bytes(4) + bytes(4)  # 300 pixels wide


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The HTML page of two runs, one of them unfinished, and the Markdown beside it."""
    folder = tmp_path_factory.mktemp("report") / ODD
    points = {500: {"accuracy": 0.5}, 1000: {"accuracy": 0.6}}
    finished = Experiment("pmnist", "bn_lstm")
    odd = {"command": EVIL, "machine": ODD, "implementation": "gpu"}
    write_run(folder / "runs", finished, 1, points, {"accuracy": 0.7}, **odd)
    write_run(folder / "runs", Experiment("pmnist", "lstm"), 1, {500: {"accuracy": 0.3}})
    page = folder / "page.html"
    given = {"runs": str(folder / "runs"), "output": str(page), "data_dir": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("https_proxy", "http://127.0.0.1:1")  # no download
        patch.setattr(report, "COMMITTED", folder)
        patch.setattr(report.flags, "FLAGS", SimpleNamespace(**given, readme=False))
        report.main([])
    return page.read_text(), page.with_suffix(".md").read_text()


class Links(HTMLParser):
    """The addresses in the links and images of a page."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]
        assert tag not in ("script", "link", "iframe")


def test_page_is_self_contained(page):
    found = Links(page[0]).found
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in found)
    assert "&lt;script&gt;" in page[0]
    assert page[0].count("<img ") == 10  # the other three need more runs or MNIST


def test_every_item_has_a_section(page):
    assert re.findall('<h2 id="(.*)">', page[0]) == list(ITEMS)
    assert re.findall("^## (.*)", page[1], re.M) == [each.title for each in ITEMS.values()]
    assert [link[1:] for link in Links(page[0]).found if link[0] == "#"] == list(ITEMS)


def test_runs_and_missing_runs_are_listed(page):
    flat = re.sub(r" +", " ", page[1])
    assert "| pmnist/bn_lstm | 1 | 1,000 of 100,000 | 1:05 h | cpu (" in flat
    assert "| 012345678 | 2026-11-23 |" in flat
    assert "| pmnist/lstm | 1 | 500 of 100,000 | -, not finished |" in flat
    assert "Not drawn: no run here has the data that it needs yet" in flat
    # At 3,900 seconds for 1,000 updates.
    assert "pmnist BN-LSTM: 1,000 of 100,000 updates, 107:15 h left at its pace." in flat
    assert "text8 LSTM: not run; text8 BN-LSTM: not run" in flat
    assert "`python -m scripts.reproduce table_text8 --budget=full`" in flat


def test_special_characters_are_escaped(page):
    """The name of a machine in tables, and that of the data folder in a sentence."""
    rendered = Outline(MarkdownIt("commonmark", {"html": False}).enable("table").render(page[1]))
    for shown in (Outline(page[0]), rendered):
        text = re.sub(r"\s+", " ", "".join(shown.text))
        assert text.count(f"cpu ({ODD}; gpu)") == 4  # once per item with the run
        assert f"/{ODD}/mnist. " in text
        assert "i" not in [element[0] for element in shown.elements]


class Refused(item.Item):
    def show(self, found, data_dir):
        raise UserError("no data")


@pytest.mark.parametrize("output", ["report.md", ".", "missing/report.html"])
def test_invalid_outputs_raise_and_write_nothing(call_main, tmp_path, output):
    write_run(tmp_path / "runs", Experiment("pmnist", "lstm"), 1, {500: {"accuracy": 0.3}})
    output = tmp_path / output
    given = {"runs": str(tmp_path / "runs"), "output": str(output), "data_dir": str(tmp_path)}
    with pytest.raises(UserError, match=f"--output={re.escape(str(output))}"):
        call_main(report, **given, readme=False)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("is_there", [True, False])
def test_committed_picture_is_shown_without_data(tmp_path, monkeypatch, is_there):
    monkeypatch.setattr(report, "COMMITTED", tmp_path)
    if is_there:
        (tmp_path / "name.png").write_bytes(PNG)
    section = report.make_section("name", Refused("Title"), {}, "data")
    assert section.notes == ["Not redrawn: no data."]
    page = report.pages.render("report.html", sections=[section])
    assert ('<img width="192" alt="Title" src="data:image/png;base64,' in page) == is_there


def test_summary_is_inserted_into_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.into_readme(readme, "| new |")
    assert readme.read_text() == (f"before\n{report.BEGIN}\n\n| new |\n\n{report.END}\nafter\n")
    readme.write_text("nothing")
    with pytest.raises(UserError, match=f"{readme} "):
        report.into_readme(readme, "| new |")


def test_summary_has_the_final_results(tmp_path):
    points = {500: {"accuracy": 0.6}, 1000: {"accuracy": 0.65}}
    write_run(tmp_path, Experiment("pmnist", "bn_lstm"), 1, points, {"accuracy": 0.7})
    table = re.sub(r" +", " ", report.summary(item.find(ITEMS.values(), tmp_path)))
    ours = "| 0.954 | 0.7000 | 1,000 of 100,000 | pmnist/bn_lstm | 1:05 h |"
    assert f"| pMNIST (released draw) | BN-LSTM | accuracy {ours}" in table
    assert "| pMNIST (released draw) | LSTM | accuracy | 0.902 | - | not run | - | - |" in table
