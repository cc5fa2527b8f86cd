"""MNIST: 28x28 images of handwritten digits, through TensorFlow Datasets without TensorFlow.

Split of the paper: the first 50,000 training images train, the last 10,000 validate.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets.originals import Originals, examples
from experiments.datasets.prepared import Made

ORIGINALS = Originals.beside(
    __file__,
    "MNIST",
    unpacked={
        "train-images-idx3-ubyte": (
            47_040_016,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        "train-labels-idx1-ubyte": (
            60_008,
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        "t10k-images-idx3-ubyte": (
            7_840_016,
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        "t10k-labels-idx1-ubyte": (
            10_008,
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    },
    folders=("MNIST/raw", "mnist/MNIST/raw"),  # of torchvision, for either folder as its root
)
SPLITS = {"train": "train[:50000]", "valid": "train[50000:]", "test": "test"}


def prepare(source_dir: Path) -> Made:
    """Makes the arrays from the original files, downloading those that are not at hand.

    Args:
        source_dir: Folder in which, or in whose subfolder `mnist`, the four original files are
            looked for, as `.gz` or unpacked; also in `MNIST/raw`, where torchvision leaves them.

    Returns:
        The arrays `{train,valid,test}_images` uint8 [N, 784] with values 0..255 and
        `{train,valid,test}_labels` uint8 [N], N being 50,000, 10,000 and 10,000; the metadata;
        the source.

    Raises:
        UserError: If an original file is damaged, if one is missing and cannot be downloaded,
            or if TensorFlow Datasets is not installed.
    """
    arrays = {}
    with ORIGINALS.built(source_dir, _builder) as (builder, source):
        for split, part in SPLITS.items():
            rows = examples(builder, part)
            arrays[f"{split}_images"] = np.stack([row["image"] for row in rows])
            arrays[f"{split}_labels"] = np.array([row["label"] for row in rows], np.uint8)
    return arrays, {"num_classes": 10, "max_pixel": 255, "image_side": 28}, source


def _builder(paths: dict[str, Path], data_dir: Path) -> Any:
    from experiments.datasets.mnist.builder import MnistRows

    return MnistRows(paths=paths, data_dir=data_dir)
