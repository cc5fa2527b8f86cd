"""Rules for the library's code: documented fields, short functions, and imports."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import bnlstm_jax

ROOT = Path(__file__).parents[2]
LIBRARY = sorted((ROOT / "bnlstm_jax").rglob("*.py"))
MODULES = [
    bnlstm_jax.LSTM,
    bnlstm_jax.BNLSTM,
    bnlstm_jax.LNLSTM,
    bnlstm_jax.LSTMCell,
    bnlstm_jax.BNLSTMCell,
    bnlstm_jax.LNLSTMCell,
    bnlstm_jax.BNSimpleCell,
    bnlstm_jax.BatchNorm,
]


@pytest.mark.parametrize("module", MODULES)
def test_modules_declare_and_document_all_fields(module):
    fields = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
    assert fields <= set(vars(module)["__annotations__"])
    documented = re.findall(r"^ {2}(\w+(?:, \w+)*): ", inspect.getdoc(module), re.MULTILINE)
    assert {name for names in documented for name in names.split(", ")} == fields
    ours = [base for base in module.__mro__[1:] if base.__module__.startswith("bnlstm_jax")]
    assert len(ours) <= 1


def functions(node, depth=0):
    """Functions under a node, with the number of functions around each."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef)
        if is_function:
            yield child, depth
        yield from functions(child, depth + is_function)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_functions_have_limited_length_and_nesting(path):
    for function, depth in functions(ast.parse(path.read_text())):
        documentation = ast.get_docstring(function, clean=False) or ""
        lines = function.end_lineno - function.lineno + 1 - len(documentation.splitlines())
        assert lines <= 60, function.name
        assert depth <= 1, function.name


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_library_imports_no_experiments_scripts_configs_or_tests(path):
    imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    assert not {"experiments", "scripts", "configs", "tests"} & set(imported)


def test_private_and_experimental_jax_imports_are_restricted():
    folders = ("bnlstm_jax", "experiments", "scripts", "configs", "tests")
    private, experimental = (
        "jax." + "_src",
        re.compile(r"^\s*(from|import) jax\.experimental", re.M),
    )
    importing = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        assert private not in path.read_text(), path
        if experimental.search(path.read_text()):
            importing.add(str(path.relative_to(ROOT)))
    files = {f"{folder}/jax_experimental.py" for folder in ("bnlstm_jax", "experiments")}
    assert importing == files
