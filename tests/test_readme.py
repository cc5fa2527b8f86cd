"""The README's examples run as they stand, and its links lead somewhere."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from configs import digits
from experiments import datasets, tasks, train
from experiments.records import runs
from experiments.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PROJECT = "bnlstm-jax/bnlstm_jax"
REPOSITORY = (
    f"^https://(github.com/{PROJECT}/(blob|tree)|raw.githubusercontent.com/{PROJECT})/main/"
)


def example(word):
    """The Python example that has a word in it."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if word in c)
    return code


def final(results):
    """The final test results of a BN-LSTM."""
    rows = {(row["split"], row["statistics"]): row for row in results["rows"]}
    return rows["test", "population"]


@pytest.mark.parametrize("number_of_devices", [1, 8])  # one: the CPU kernel; several: XLA
def test_layer_examples_run(number_of_devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: number_of_devices)
    names = {}
    exec(example("nn.Module"), names)
    assert names["logits"].shape == (1, 10)
    statistics = jax.tree.leaves(names["variables"]["batch_stats"])
    assert all(leaf.shape[0] == 784 for leaf in statistics) and len(statistics) == 6

    exec(example("nnx.bridge"), names)
    for collection, path in (
        ("params", ("Dense_0", "bias")),
        ("batch_stats", ("BNLSTM_0", "cell_mean")),
    ):
        zero_at_first = names["variables"][collection][path[0]][path[1]]
        assert np.any(zero_at_first != 0), path
    variables = {**names["variables"], "batch_stats": names["population"]}
    expected = names["model"].apply(variables, names["x"][:1])
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-6)


def test_loaded_run_reproduces_its_recorded_loss(tmp_path, monkeypatch):
    config = digits.get_config()
    config.data_dir = str(tmp_path / "data")
    config.num_updates = config.eval_every = 4
    config.model.kind, config.model.features = "bn_lstm", 8
    results = train.train(config, tmp_path / "runs/digits/bn_lstm")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("runs.load").replace('"test", 5', '"test", 250'), names)
    labels = load_digits().target[-250:][tasks.evaluation_order(250)]
    np.testing.assert_array_equal(names["batch"]["label"], labels)
    log_p = jax.nn.log_softmax(names["logits"])
    loss = -np.mean(log_p[np.arange(250), labels])
    assert loss == pytest.approx(final(results)["loss"], rel=1e-5)
    run = names["run"]
    assert (run.update, run.statistics) == (results["update"], "population")
    assert run.config.to_dict() == config.to_dict()


def test_run_with_a_different_dataset_hash_raises(tmp_path):
    config = digits.get_config()
    config.data_dir = str(tmp_path / "data")
    config.num_updates = config.eval_every = 1
    config.model.kind, config.model.features = "lstm", 4
    train.train(config, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(record | {"dataset_sha256": "other"}))
    with pytest.raises(UserError, match="dataset_sha256 is 'other'"):
        runs.load(tmp_path / "run")


def test_published_weights_reproduce_the_reported_accuracy(data_dir, monkeypatch):
    monkeypatch.chdir(ROOT)
    arrays = datasets.load("mnist", str(data_dir)).arrays
    names = {"images": arrays["test_images"][:500].reshape(-1, 28, 28)}
    exec(example("results/weights"), names)
    accuracy = np.mean(names["logits"].argmax(-1) == arrays["test_labels"][:500])
    record = ROOT / "results/runs/pmnist/bn_lstm/seed_1/results.json"
    reported = final(json.loads(record.read_text()))["accuracy"]
    deviation = (reported * (1 - reported) / 500) ** 0.5  # of the accuracy on 500 images
    assert accuracy == pytest.approx(reported, abs=3 * deviation)


def links(text):
    """Targets of the links of a page, `[text][name]` included; code blocks have no links."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.M)
    named = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.M))
    return re.findall(r"\]\(([^)]+)", text) + [named[n] for n in re.findall(r"\]\[([^\]]+)", text)]


def anchors(page):
    """The fragments of links to a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_repository_links_resolve():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")):
        for link in links(page.read_text()):
            target, _, fragment = re.sub(REPOSITORY, f"{ROOT}/", link).partition("#")
            if target.startswith("http"):
                continue
            place = page.parent / target if target else page
            assert place.exists(), (page, link)
            assert not fragment or fragment in anchors(place), (page, link)


def test_readme_links_are_absolute():
    # A package index shows this page without the repository.
    assert all(link.startswith("https://") for link in links(TEXT))
    assert len(links(TEXT)) > 10


def mapped():
    """The paths of the map, and its folders whose content it does not list."""
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


def test_file_map_matches_the_repository():
    paths, leaves = mapped()
    for path in paths:
        assert (ROOT / path).exists(), path
    for folder in ("bnlstm_jax", "experiments", "configs", "scripts", "examples"):
        for file in (ROOT / folder).rglob("*"):
            path = str(file.relative_to(ROOT))
            ignored = (
                file.is_dir() or file.name in ("__init__.py", "py.typed") or "__pycache__" in path
            )
            assert ignored or path in paths or any(path.startswith(leaf) for leaf in leaves), path
