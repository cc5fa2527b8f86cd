"""The README's example runs as it stands, and its links lead somewhere."""

import re
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PROJECT = "bnlstm-jax/bnlstm_jax"
REPOSITORY = f"^https://(github.com/{PROJECT}/blob|raw.githubusercontent.com/{PROJECT})/main/"


def test_the_layer_examples_run():
    linen, with_nnx = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(linen, names)
    assert names["logits"].shape == (1, 10)
    statistics = jax.tree.leaves(names["variables"]["batch_stats"])
    assert all(leaf.shape[0] == 784 for leaf in statistics) and len(statistics) == 6

    exec(with_nnx, names)
    variables = {**names["variables"], "batch_stats": names["population"]}
    expected = names["model"].apply(variables, names["x"][:1])
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-6)


def links(text):
    """Targets of links in a page, those of `[text][name]` too."""
    named = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.M))
    return re.findall(r"\]\(([^)]+)", text) + [named[n] for n in re.findall(r"\]\[([^\]]+)", text)]


def test_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")):
        for link in links(page.read_text()):
            target = re.sub(REPOSITORY, f"{ROOT}/", link).partition("#")[0]
            assert target.startswith("http") or (page.parent / target).exists(), (page, link)


def test_readme_links_are_absolute():
    # A package index shows this page without the repository.
    assert all(link.startswith("https://") for link in links(TEXT))
    assert len(links(TEXT)) > 10


def mapped():
    """Files and folders of the map, and of these the folders whose content it does not list."""
    (tree,) = re.findall(r"```\n(bnlstm_jax/.*?)```", TEXT, re.DOTALL)
    paths, folders, leaves = set(), [], set()
    for line in tree.splitlines():
        depth, rest = divmod(len(line) - len(line.lstrip()), 2)
        if depth > 6 or rest:  # a description alone
            continue
        for name in re.split(r"  ", line.strip())[0].split(", "):
            name = name.split(" ")[0]
            path = "".join(folders[:depth]) + name
            paths.add(path)
            if name.endswith("/"):
                folders[depth:] = [name]
                leaves.add(path)
            leaves.discard("".join(folders[:depth]))
    return paths, leaves


def test_the_map_names_every_file_and_no_other():
    paths, leaves = mapped()
    for path in paths:
        assert (ROOT / path).exists(), path
    for folder in ("bnlstm_jax", "experiments", "configs", "scripts"):
        for file in (ROOT / folder).rglob("*"):
            path = str(file.relative_to(ROOT))
            ignored = (
                file.is_dir() or file.name in ("__init__.py", "py.typed") or "__pycache__" in path
            )
            assert ignored or path in paths or any(path.startswith(leaf) for leaf in leaves), path
