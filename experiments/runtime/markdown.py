"""Markdown that reads as the plain text it is made of: names of files, values and messages."""

import re
from collections.abc import Iterable

# The characters of Markdown, or of GitHub's. Not among them: `_` within words, and asterisks at the
# end of a word, which cannot open emphasis.
SPECIAL = re.compile(r"[\\`\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])|\*(?=\**[^\s*])")


def escape(text: str) -> str:
    """The Markdown, also within a table, that reads as `text` does, in one line."""
    return SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of plain text, which is aligned and escaped."""
    lines = [[escape(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
