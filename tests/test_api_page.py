"""The page of the library's interface: a command in CONTRIBUTING.md builds it from docstrings."""

import html
import inspect
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import flax.linen as nn
import pytest

import bnlstm_jax

ROOT = Path(__file__).parents[1]
VARIABLE = "CURRENT_BATCH_STATS"


class Sections(HTMLParser):
    """The words of each public name's section of a page."""

    def __init__(self, page):
        super().__init__()
        self.words, self._name = {}, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "section":
            self._name = dict(attributes).get("id")

    def handle_endtag(self, tag):
        if tag == "section":
            self._name = None

    def handle_data(self, data):
        self.words.setdefault(self._name, set()).update(words_of(data))


def words_of(text):
    return set(re.findall(r"\w+", text))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("pdoc", reason="needs pdoc, of tests/requirements.txt")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (arguments,) = re.findall(r"^pdoc (.+) -o docs/site$", text, re.M)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pdoc", *shlex.split(arguments), "-o", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return (folder / "bnlstm_jax.html").read_text()


def test_every_public_name_is_documented(page):
    words = Sections(page).words
    for name in bnlstm_jax.__all__:
        value = getattr(bnlstm_jax, name)
        if name == VARIABLE:
            assert {value, "estimate_population_statistics"} <= words[name]
            continue
        documented = [value]
        if isinstance(value, type) and issubclass(value, nn.Module):
            documented += [value.__call__]
            documented += [value.initialize_carry] if name.endswith("Cell") else []
        for thing in documented:
            missing = words_of(inspect.getdoc(thing)) - words[name]
            assert missing <= {"Args", "bnlstm_jax"}, name  # Arguments there; left out in links


def test_inherited_flax_members_are_omitted(page):
    shown = set(re.findall(r'id="BNLSTMCell\.(\w+)"', page))
    assert shown == {"__init__", "__call__", "initialize_carry"}
    assert "::" not in re.sub(r"(?s)<(style|script).*?</\1>", "", page)


def test_default_values_are_readable(page):
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?s)<(style|script).*?</\1>", "", page)))
    assert "scale_init: Initializer = constant(...)" in text
    assert not re.search(r"<(function|class)\b", text)
