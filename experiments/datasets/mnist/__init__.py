"""MNIST: 28x28 images of handwritten digits, through TensorFlow Datasets without TensorFlow.

Split of the paper: the first 50,000 training images train, the last 10,000 validate.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets.originals import Originals, examples
from experiments.datasets.prepared import Made

ORIGINALS = Originals.beside(__file__, "MNIST")
SPLITS = {"train": "train[:50000]", "valid": "train[50000:]", "test": "test"}


def prepare(source_dir: Path) -> Made:
    """Makes the arrays from the original files, downloading those that are not at hand.

    Args:
        source_dir: Folder in which, or in whose subfolder `mnist`, the four original `.gz` files
            are looked for.

    Returns:
        The arrays `{train,valid,test}_images` uint8 [N, 784] with values 0..255 and
        `{train,valid,test}_labels` uint8 [N], N being 50,000, 10,000 and 10,000; the metadata;
        the source.

    Raises:
        UserError: If an original file is damaged, if one is missing and the download host does
            not answer, or if TensorFlow Datasets is not installed.
    """
    arrays = {}
    with ORIGINALS.built(source_dir, _builder) as (builder, source):
        for split, part in SPLITS.items():
            rows = examples(builder, part)
            arrays[f"{split}_images"] = np.stack([row["image"] for row in rows])
            arrays[f"{split}_labels"] = np.array([row["label"] for row in rows], np.uint8)
    return arrays, {"num_classes": 10, "max_pixel": 255, "image_side": 28}, source


def _builder(data_dir: Path) -> Any:
    from experiments.datasets.mnist.builder import MnistRows

    return MnistRows(data_dir=data_dir)
