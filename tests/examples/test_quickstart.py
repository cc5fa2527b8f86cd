import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FILE = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def accuracies(notebook):
    """The printed test accuracies: with running averages, and with population statistics."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    text = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    return [float(number) for number in re.findall(r"test accuracy by .*: +([\d.]+)", text)]


def test_outputs_are_committed_and_small():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    running, population = accuracies(notebook)
    assert running < 0.3 and population > 0.6  # as the text says
    assert FILE.stat().st_size < 200_000
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert "/site-packages/" not in FILE.read_text()  # no warnings


@pytest.mark.long
def test_notebook_reproduces_the_committed_accuracy():
    notebook = nbformat.read(FILE, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, resources={"metadata": {"path": FILE.parents[1]}}).execute()
    running, population = accuracies(notebook)
    assert running < 0.3
    # Rounding differs between processors, and updates amplify the difference.
    assert population == pytest.approx(accuracies(nbformat.read(FILE, as_version=4))[1], abs=0.1)
