"""Makes and writes figures, with Matplotlib."""

import io
from pathlib import Path
from typing import Any

from experiments.runtime import files
from experiments.runtime.errors import UserError

DPI = 150


def new_figure(title: str, width: float, height: float, math: bool = False) -> Any:
    """A figure with a title; `width` and `height` are in inches.

    With `math`, `$...$` in the title is a formula; without, file names may have dollar signs.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="medium", parse_math=math)
    return figure


def tidy(axes: Any) -> None:
    """Adds a grid and removes the upper and right spines."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Any) -> bytes:
    """The content of a figure's PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def save(figure: Any, picture: Path) -> None:
    """Writes a figure atomically, in the format of the file's suffix.

    Raises:
      UserError: its format is unknown.
    """
    try:
        with files.replacing(picture) as temporary:
            figure.savefig(temporary, format=picture.suffix[1:], dpi=DPI)
    except ValueError as error:
        raise UserError(f"{picture} cannot be written: {error}") from error
