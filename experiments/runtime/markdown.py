"""Plain text as Markdown: escapes file names, values and messages, and makes tables."""

import re
from collections.abc import Iterable

# The special characters of Markdown and of GitHub's. `_` within words and asterisks at the end of a
# word are not among them: they cannot open emphasis.
SPECIAL = re.compile(r"[\\`\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])|\*(?=\**[^\s*])")


def escape(text: str) -> str:
    """Escapes `text` for Markdown, in one line that also fits in a table."""
    return SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table of plain text, aligned and escaped."""
    lines = [[escape(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
