"""Text of others in Markdown: file names, values and messages are shown as they are."""

import re

# What Markdown, or GitHub's, takes for its own: in words, `_` is none of it.
OWN = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")


def escape(text: str) -> str:
    """The Markdown, also within a table, that reads as `text` does, in one line."""
    return OWN.sub(r"\\\g<0>", " ".join(text.split()))


def cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table as they read, less the line below its header."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
    rows = [[re.sub(r"\\(\W|_)", r"\1", cell.strip()) for cell in line] for line in lines]
    return [rows[0], *rows[2:]]
