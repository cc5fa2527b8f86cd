"""Text of others in Markdown: file names, values and messages are shown as they are."""

import re
from collections.abc import Iterable

# What Markdown, or GitHub's, takes for its own: in words, `_` is none of it.
OWN = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")


def escape(text: str) -> str:
    """The Markdown, also within a table, that reads as `text` does, in one line."""
    return OWN.sub(r"\\\g<0>", " ".join(text.split()))


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table as they read, less the line below its header."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines()]
    rows = [[re.sub(r"\\(\W|_)", r"\1", cell.strip()) for cell in line] for line in lines]
    return [rows[0], *rows[2:]]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that reads well as it is and in Markdown."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
