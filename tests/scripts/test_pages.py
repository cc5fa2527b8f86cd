"""The pages that commands write, opened from disk in headless Chromium."""

import shutil
from pathlib import Path

import pytest

from experiments.records.runs import Experiment
from scripts import report
from tests.scripts.made_up import ODD, write_run
from tests.test_trust import NASTY, page_of

pytestmark = pytest.mark.long

BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # if Playwright has none
TEXT = f"{' '.join(NASTY)} {'Donaudampfschiff' * 10}"  # markup, and a word wider than a phone
MARKUP = "script, img[src=x], [onerror], [onclick], [onmouseover]"


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install it")
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        places = [own] if Path(own).exists() else list(filter(None, map(shutil.which, BROWSERS)))
        if not places:
            pytest.skip("needs Chromium: playwright install chromium")
        chromium = playwright.chromium.launch(executable_path=places[0])
        yield chromium
        chromium.close()


def check(browser, file, width, pictures):
    """Opens a page on a screen of `width` pixels; returns its text."""
    page, told = browser.new_page(viewport={"width": width, "height": 800}), []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: told.append(request.url[:40]))
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert [url for url in told if not url.startswith("data:image/png;base64,")] == [
        file.as_uri()[:40]
    ]
    loaded = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert loaded == [True] * pictures
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(MARKUP).count() == 0
    return page.locator("body").inner_text()


@pytest.mark.parametrize("width", [1280, 390])
def test_report_renders_in_a_browser(browser, width, call_main, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")  # nothing is downloaded
    folder, points = tmp_path / ODD, {500: {"accuracy": 0.5}}
    start = {"command": TEXT, "commit": "<b>", "machine": TEXT, "devices": [TEXT]}
    write_run(folder, Experiment("pmnist", "bn_lstm"), 1, points, {"accuracy": 0.7}, **start)
    page = folder / "report.html"
    given = {"runs": str(folder), "output": str(page), "data_dir": str(folder / TEXT[-160:])}
    call_main(report, **given, readme=False)
    text = check(browser, page, width, page.read_text().count("<img "))
    assert " ".join(TEXT.split()) in text and ODD in text


@pytest.mark.parametrize("width", [1280, 390])
def test_reader_page_renders_in_a_browser(browser, width, tmp_path):
    page = tmp_path / f"{ODD}.html"
    page.write_text(page_of(TEXT), encoding="utf-8")
    assert TEXT in check(browser, page, width, pictures=0)
