import numpy as np
from sklearn.datasets import load_digits

from experiments.datasets import load


def test_digits_match_scikit_learn_in_order(tmp_path):
    dataset = load("digits", str(tmp_path))
    bunch = load_digits()
    parts = {"images": bunch.images.reshape(1797, 64), "labels": bunch.target}
    for kind, whole in parts.items():
        splits = [dataset.arrays[f"{split}_{kind}"] for split in ("train", "valid", "test")]
        assert [len(split) for split in splits] == [1297, 250, 250]
        assert all(split.dtype == np.uint8 for split in splits)
        np.testing.assert_array_equal(np.concatenate(splits), whole)
    assert len(dataset.arrays) == 6
    assert dataset.info == {"num_classes": 10, "max_pixel": 16, "image_side": 8}
    assert dataset.arrays["train_images"].max() == dataset.info["max_pixel"]
