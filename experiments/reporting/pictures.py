"""How scripts make figures and write them."""

import io
from pathlib import Path
from typing import Any

from experiments.runtime import files
from experiments.runtime.errors import UserError

DPI = 150


def new_figure(title: str, width: float, height: float, math: bool = False) -> Any:
    """A figure of so many inches, with a title.

    `math` is whether `$...$` in the title is a formula: names of files may have dollar signs.

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
    """Gives axes a grid, and takes their upper and right lines away."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Any) -> bytes:
    """A figure as the content of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def save(figure: Any, picture: Path) -> None:
    """Writes a figure, in the format of the file's ending, whole or not at all.

    Raises:
      UserError: it cannot be written there, or not so.
    """
    try:
        with files.replacing(picture) as temporary:
            figure.savefig(temporary, format=picture.suffix[1:], dpi=DPI)
    except (OSError, ValueError) as error:  # ValueError: an unknown ending
        problem = getattr(error, "strerror", None) or error
        raise UserError(f"--output={picture} cannot be written: {problem}") from error
