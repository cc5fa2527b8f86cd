"""The small digits of scikit-learn: 1,797 images of 8x8 pixels, no download needed."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from experiments.datasets.prepared import Made

TRAIN, VALID = 1297, 250  # the last 250 images are the test set


def prepare(source_dir: Path, work_dir: Path) -> Made:
    """Takes the digits from scikit-learn, in their own order.

    Args:
      source_dir: not used; the data come with the scikit-learn package.
      work_dir: not used.

    Returns:
      The arrays `{train,valid,test}_images` uint8 [N, 64] with values 0..16 and
      `{train,valid,test}_labels` uint8 [N], N being 1297, 250 and 250; the metadata; the source.
    """
    images, labels = (array.astype(np.uint8) for array in load_digits(return_X_y=True))
    arrays = {}
    for split, rows in {
        "train": slice(TRAIN),
        "valid": slice(TRAIN, TRAIN + VALID),
        "test": slice(TRAIN + VALID, None),
    }.items():
        arrays[f"{split}_images"] = images[rows]
        arrays[f"{split}_labels"] = labels[rows]
    info = {"num_classes": 10, "max_pixel": 16, "image_side": 8}
    source = {"from": "sklearn.datasets.load_digits", "packages": ["scikit-learn"]}
    return arrays, info, source
