"""MNIST: 28x28 images of handwritten digits.

The paper's split: the first 50,000 training images are for training, the last 10,000 for
validation.
"""

import gzip
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import examples
from experiments.datasets.originals import Original, Originals
from experiments.datasets.prepared import Made

HOSTS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist",
)


def _file(name: str, packed: tuple[int, str], unpacked: tuple[int, str]) -> Original:
    """A file by sizes and SHA-256 of its packed and its unpacked form."""
    urls = tuple(f"{host}/{name}.gz" for host in HOSTS)
    return Original(f"{name}.gz", *packed, urls, Original(name, *unpacked))


ORIGINALS = Originals(
    "mnist",
    "MNIST",
    (
        _file(
            "train-images-idx3-ubyte",
            (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        ),
        _file(
            "train-labels-idx1-ubyte",
            (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        ),
        _file(
            "t10k-images-idx3-ubyte",
            (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        ),
        _file(
            "t10k-labels-idx1-ubyte",
            (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
            (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
        ),
    ),
    folders=("MNIST/raw", "mnist/MNIST/raw"),  # torchvision's, for `source_dir` or `mnist` as root
)
FEATURES = {
    "image": tfds.features.Tensor(shape=(784,), dtype=np.uint8, encoding="bytes"),
    "label": tfds.features.Tensor(shape=(), dtype=np.uint8),
}
SPLITS = {
    "train": ("train", slice(50_000)),
    "valid": ("train", slice(50_000, None)),
    "test": ("t10k", slice(None)),
}


def prepare(source_dir: Path, work_dir: Path) -> Made:
    """Makes the arrays from the original files, downloading those that are missing.

    Args:
      source_dir: folder that may have the four original files, directly or in its subfolder
        `mnist`, as `.gz` or unpacked; or in `MNIST/raw` in either, where torchvision writes them.
      work_dir: folder for downloads.

    Returns:
      The arrays `{train,valid,test}_images` uint8 [N, 784] with values 0..255 and
      `{train,valid,test}_labels` uint8 [N], N being 50,000, 10,000 and 10,000; the metadata;
      the source.

    Raises:
      UserError: if an original file is damaged, or is missing and cannot be downloaded.
    """
    paths, files = ORIGINALS.get(source_dir, work_dir)
    splits = {}
    for part in ("train", "t10k"):
        images = _read_idx(paths[f"{part}-images-idx3-ubyte.gz"]).reshape(-1, 784)
        labels = _read_idx(paths[f"{part}-labels-idx1-ubyte.gz"])
        splits[part] = [
            {"image": image, "label": label} for image, label in zip(images, labels, strict=True)
        ]
    rows = examples.read(FEATURES, splits, work_dir)
    arrays = {}
    for split, (part, chosen) in SPLITS.items():
        arrays[f"{split}_images"] = np.stack([row["image"] for row in rows[part][chosen]])
        arrays[f"{split}_labels"] = np.array([row["label"] for row in rows[part][chosen]], np.uint8)
    info = {"num_classes": 10, "max_pixel": 255, "image_side": 28}
    return arrays, info, {"files": files, "packages": examples.PACKAGES}


def _read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of bytes, gzipped or not: zeros, type, rank, big-endian sizes, values."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    rank = data[3]
    shape = np.frombuffer(data, ">i4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
