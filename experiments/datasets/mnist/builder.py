"""The TensorFlow Datasets builder for MNIST; importing it needs `tensorflow_datasets`.

TFDS's own `mnist` unpacks gzip and encodes PNG with TensorFlow. This one needs no TensorFlow: it
keeps each image as a row of pixels in ArrayRecord files.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class MnistRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """MNIST as rows of 784 pixels: 60,000 training and 10,000 test images, in original order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, paths: dict[str, Path], **kwargs: Any) -> None:
        """The original files, packed or not, lie at `paths`, by the names of the packed ones."""
        self.paths = paths
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 28x28 pixels, as rows of 784 values.",
            homepage="http://yann.lecun.com/exdb/mnist/",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(784,), dtype=np.uint8, encoding="bytes"),
                    "label": tfds.features.Tensor(shape=(), dtype=np.uint8),
                }
            ),
            disable_shuffling=True,  # the paper's validation set is the last 10,000 images
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {
            split: self._generate_examples(
                self.paths[f"{prefix}-images-idx3-ubyte.gz"],
                self.paths[f"{prefix}-labels-idx1-ubyte.gz"],
            )
            for split, prefix in {"train": "train", "test": "t10k"}.items()
        }

    def _generate_examples(self, images: Path, labels: Path) -> Iterator[tuple[int, dict]]:
        rows = _read_idx(images).reshape(-1, 784)
        for index, (image, label) in enumerate(zip(rows, _read_idx(labels), strict=True)):
            yield index, {"image": image, "label": label}


def _read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of bytes, gzipped or not: zeros, type, rank, big-endian sizes, values."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    rank = data[3]
    shape = np.frombuffer(data, ">i4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
