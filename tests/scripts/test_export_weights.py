import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from bnlstm_jax import BNLSTM
from experiments import datasets
from experiments.models.sequence_classifier import SequenceClassifier
from experiments.runtime.errors import UserError
from experiments.tasks.sequential_images import pixel_order
from scripts import export_weights


@pytest.fixture
def export(call_main):
    """Runs the command in this process; returns what it prints."""
    return lambda folder, output: (
        call_main(export_weights, workdir=str(folder), output=str(output)).out
    )


def test_exported_weights_reproduce_the_results(digits_run, export, tmp_path):
    folder, config, results = digits_run
    output = export(folder, tmp_path / "new" / "weights.npz")
    assert "population statistics, re-estimated" in output

    variables = unflatten_dict(dict(np.load(tmp_path / "new" / "weights.npz")), sep="/")
    assert {array.dtype for array in jax.tree.leaves(variables)} == {np.dtype("float32")}
    data = datasets.load("digits", config.data_dir)
    pixels = data.arrays["test_images"][:, pixel_order(config.pixel_order, 64, 1), None]
    logits = SequenceClassifier(BNLSTM(4, max_steps=64), num_classes=10).apply(
        variables, pixels / jnp.float32(data.info["max_pixel"]), use_running_average=True
    )
    labels = data.arrays["test_labels"]
    rows = {(row["split"], row["statistics"]): row for row in results["rows"]}
    row = rows["test", "population"]
    assert np.mean(logits.argmax(-1) == labels) == pytest.approx(row["accuracy"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(int))
    assert np.mean(losses) == pytest.approx(row["loss"], rel=1e-5)


def test_unfinished_run_exports_running_averages(finished, export, tmp_path):
    (finished / "population_statistics.npz").unlink()
    output = export(finished, tmp_path / "weights.npz")
    assert "update 3, population statistics, running average" in output


def test_output_without_npz_suffix_raises(finished, export, tmp_path):
    with pytest.raises(UserError, match=r"--output=.*weights\.bin must end with \.npz"):
        export(finished, tmp_path / "weights.bin")
    assert [path.name for path in tmp_path.iterdir()] == [finished.name]


def test_folder_without_a_run_raises_and_writes_no_file(export, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        export(tmp_path / "empty", tmp_path / "weights.npz")
    assert not (tmp_path / "weights.npz").exists()
