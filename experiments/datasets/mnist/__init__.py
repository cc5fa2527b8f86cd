"""MNIST: 28x28 images of handwritten digits, through TensorFlow Datasets without TensorFlow.

Split of the paper: the first 50,000 training images train, the last 10,000 validate.
"""

import contextlib
import csv
import importlib
import queue
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from experiments.datasets.prepared import Made, file_sha256
from experiments.errors import UserError

SPLITS = {"train": "train[:50000]", "valid": "train[50000:]", "test": "test"}
CONNECT_SECONDS = 5  # for each address of the download host
PROBE_SECONDS = 8  # in all, because looking a name up has no timeout of its own


class Original(NamedTuple):
    """One of the four original files, a row of `checksums.tsv`."""

    url: str
    size: int
    sha256: str
    name: str


def originals() -> list[Original]:
    """The four original files."""
    with Path(__file__).with_name("checksums.tsv").open(newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        return [Original(url, int(size), sha256, name) for url, size, sha256, name in rows]


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
    folder = _originals_folder(source_dir)
    missing = [file for file in originals() if not (folder / file.name).exists()]
    for file in originals():
        if file not in missing:
            _check(folder / file.name, file)
    _require_packages(source_dir)
    if missing:
        _require_host(missing[0].url, folder)

    with tempfile.TemporaryDirectory(prefix="mnist-") as work_dir:
        arrays = _through_tfds(folder, Path(work_dir))
    info = {"num_classes": 10, "max_pixel": 255, "image_side": 28}
    source = {
        "files": [file._asdict() | {"downloaded": file in missing} for file in originals()],
        "packages": ["tensorflow-datasets", "array_record"],
    }
    return arrays, info, source


def _through_tfds(manual_dir: Path, work_dir: Path) -> dict[str, np.ndarray]:
    import requests
    import tensorflow_datasets as tfds

    from experiments.datasets.mnist.builder import MnistRows

    builder = MnistRows(data_dir=work_dir)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, force_checksums_validation=True)
    failures = (
        requests.RequestException,
        tfds.download.DownloadError,
        tfds.download.download_manager.NonMatchingChecksumError,
    )
    try:
        with _quiet():
            builder.download_and_prepare(file_format="array_record", download_config=config)
    except failures as error:
        raise _not_downloaded(manual_dir, type(error).__name__) from error
    arrays = {}
    for split, rows in SPLITS.items():
        records = builder.as_data_source(rows)
        examples = records.__getitems__(range(len(records)))  # four times as fast as iterating
        arrays[f"{split}_images"] = np.stack([example["image"] for example in examples])
        arrays[f"{split}_labels"] = np.array([example["label"] for example in examples], np.uint8)
    return arrays


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS, which bars, prints and logs its temporary files."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _originals_folder(source_dir: Path) -> Path:
    """`source_dir` if an original file lies in it, else its subfolder `mnist`."""
    at_hand = any((source_dir / file.name).exists() for file in originals())
    return source_dir if at_hand else source_dir / "mnist"


def _check(path: Path, expected: Original) -> None:
    """Raises a `UserError` if a file at hand is not the original."""
    size, sha256 = path.stat().st_size, file_sha256(path)
    if (size, sha256) != (expected.size, expected.sha256):
        raise UserError(
            f"{path} is damaged: {size} bytes, SHA-256 {sha256[:12]}, where the original has "
            f"{expected.size} bytes, SHA-256 {expected.sha256[:12]}; delete it and fetch it again "
            f"from {expected.url}"
        )


def _require_packages(source_dir: Path) -> None:
    """Raises a `UserError` if a package that preparing needs is not installed."""
    try:
        # TFDS itself imports the first two only when it comes to need them.
        for package in ("array_record", "importlib_resources", "tensorflow_datasets"):
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"MNIST is not prepared yet, and preparing it needs the package {error.name}: "
            f"copy {source_dir / 'prepared' / 'mnist'} from a machine where "
            "python -m scripts.prepare_data mnist ran, or pip install -r requirements.txt"
        ) from error


def _require_host(url: str, folder: Path) -> None:
    """Raises a `UserError` if the download host does not answer soon.

    TFDS by itself would retry for minutes before it gives up.
    """
    import requests  # TFDS downloads with it: the same proxies and certificates apply

    answers = queue.SimpleQueue()

    def ask() -> None:
        try:
            requests.head(url, timeout=CONNECT_SECONDS).raise_for_status()
            answers.put(None)
        except requests.RequestException as error:
            answers.put(type(error).__name__)

    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        problem = "no answer"
    if problem:
        raise _not_downloaded(folder, problem)


def _not_downloaded(folder: Path, problem: str) -> UserError:
    files = originals()
    return UserError(
        f"MNIST cannot be downloaded from {files[0].url.rpartition('/')[0]} ({problem}): place "
        f"{', '.join(file.name for file in files)} in the folder {folder}; "
        "they can be copied from a machine with network"
    )
