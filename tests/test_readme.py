"""The README's example runs as it stands, and its links lead somewhere."""

import re
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_layer_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (1, 10)
    statistics = jax.tree.leaves_with_path(names["variables"]["batch_stats"])
    assert all(leaf.shape[0] == 784 for _, leaf in statistics) and len(statistics) == 6


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


def test_every_file_named_in_the_map_is_there():
    (tree,) = re.findall(r"```\n(bnlstm_jax/.*?)```", TEXT, re.DOTALL)
    folder = None
    for line in tree.splitlines():
        for name in re.findall(r"^(\w+/)|[ ;,](\w+(?:\.py|/))", line):
            if name[0]:
                folder = ROOT / name[0]
            path = folder if name[0] else folder / name[1]
            assert path.exists() or (ROOT / name[1]).exists(), path
