import pytest
from markdown_it import MarkdownIt

from experiments.runtime import markdown
from tests.scripts.made_up import ODD
from tests.test_trust import Outline


def render(text):
    return Outline(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))


@pytest.mark.parametrize("cell", [ODD, "*a* **b** BN-e*", "BN-e** *", "_a_ b_c [x](y)", r"a\|b"])
def test_special_characters_are_escaped(cell):
    table = render(markdown.table(["a|b", cell], [["1", cell], ["2", ""]]))
    assert "".join(table.text).split() == f"a|b {cell} 1 {cell} 2".split()
    assert [each for each in table.elements if each in (("td", ()), ("th", ()))] == [
        *[("th", ())] * 2,
        *[("td", ())] * 4,
    ]
    sentence = render(markdown.escape(f"x {cell}"))
    assert "".join(sentence.text) == f"x {cell}\n"
    assert sentence.elements == [("p", ()), "/p"]


def test_tables_are_aligned_and_plain_names_not_escaped():
    text = markdown.table(["model", "n"], [["BN-e**", "1,000"], ["rare_words", "2"]])
    assert text.splitlines() == [
        "| model      | n     |",
        "|------------|-------|",
        "| BN-e**     | 1,000 |",
        "| rare_words | 2     |",
    ]
