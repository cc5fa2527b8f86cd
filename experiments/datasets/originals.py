"""Original files of data sets: found in a folder and verified, or downloaded, and read by TFDS."""

import contextlib
import csv
import dataclasses
import importlib
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from experiments.datasets.prepared import file_sha256
from experiments.errors import UserError

CONNECT_SECONDS = 5  # for each address of the download host
PROBE_SECONDS = 8  # in all, because looking a name up has no timeout of its own


class Original(NamedTuple):
    """An original file, a row of `checksums.tsv`."""

    url: str
    size: int
    sha256: str
    name: str


@dataclasses.dataclass(frozen=True)
class Originals:
    """The original files of a data set.

    Attributes:
        name: Name of the data set, and of the subfolder in which its files may lie.
        title: What messages call it.
        files: The files, all from one folder of one host.
    """

    name: str
    title: str
    files: tuple[Original, ...]

    @classmethod
    def beside(cls, module_file: str, title: str) -> "Originals":
        """The files that `checksums.tsv` lists beside the module of a data set's package."""
        folder = Path(module_file).parent
        with (folder / "checksums.tsv").open(newline="") as table:
            rows = csv.reader(table, delimiter="\t")
            files = tuple(
                Original(url, int(size), sha256, name) for url, size, sha256, name in rows
            )
        return cls(folder.name, title, files)

    def folder(self, source_dir: Path) -> Path:
        """`source_dir` if one of the files lies in it, else its subfolder of the data set's name.

        The subfolder need not exist.
        """
        at_hand = any((source_dir / file.name).is_file() for file in self.files)
        return source_dir if at_hand else source_dir / self.name

    @contextlib.contextmanager
    def built(
        self, source_dir: Path, builder: Callable[[Path], Any]
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Prepares a TFDS builder in a temporary folder, downloading the files not at hand.

        Args:
            source_dir: Folder in which, or in whose subfolder, the files are looked for.
            builder: Makes the builder for a `data_dir`. Called when TFDS is known to be there.

        Yields:
            The builder, to be read within the context; and the source for the manifest.

        Raises:
            UserError: If a file is damaged, if one is missing and the download host does not
                answer, or if TensorFlow Datasets is not installed.
        """
        folder = self.folder(source_dir)
        missing = [file for file in self.files if not (folder / file.name).is_file()]
        for file in self.files:
            if file not in missing:
                _check(folder / file.name, file)
        self.require_packages(source_dir)
        if missing:
            self._require_host(missing[0].url, folder)
        source = {
            "files": [file._asdict() | {"downloaded": file in missing} for file in self.files],
            "packages": ["tensorflow-datasets", "array_record"],
        }
        with tempfile.TemporaryDirectory(prefix=f"{self.name}-") as work_dir:
            built = builder(Path(work_dir))
            self._download_and_prepare(built, folder)
            yield built, source

    def _download_and_prepare(self, builder: Any, folder: Path) -> None:
        import requests
        import tensorflow_datasets as tfds

        config = tfds.download.DownloadConfig(manual_dir=folder, force_checksums_validation=True)
        failures = (
            requests.RequestException,
            tfds.download.DownloadError,
            tfds.download.download_manager.NonMatchingChecksumError,
        )
        try:
            with _quiet():
                builder.download_and_prepare(file_format="array_record", download_config=config)
        except failures as error:
            raise self._not_downloaded(folder, type(error).__name__) from error

    def require_packages(self, source_dir: Path) -> None:
        """Raises a `UserError` if a package that preparing needs is not installed."""
        try:
            # TFDS itself imports the first two only when it comes to need them.
            for package in ("array_record", "importlib_resources", "tensorflow_datasets"):
                importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.title} is not prepared yet, and preparing it needs the package "
                f"{error.name}: copy {source_dir / 'prepared' / self.name} from a machine where "
                f"python -m scripts.prepare_data {self.name} ran, or "
                "pip install -r requirements.txt"
            ) from error

    def _require_host(self, url: str, folder: Path) -> None:
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
            raise self._not_downloaded(folder, problem)

    def _not_downloaded(self, folder: Path, problem: str) -> UserError:
        return UserError(
            f"{self.title} cannot be downloaded from {self.files[0].url.rpartition('/')[0]} "
            f"({problem}): place {', '.join(file.name for file in self.files)} in the folder "
            f"{folder}, copied from a machine with network"
        )


def examples(builder: Any, split: str) -> list[dict[str, Any]]:
    """All examples of a split, in order."""
    records = builder.as_data_source(split)
    return records.__getitems__(range(len(records)))  # four times as fast as iterating


def _check(path: Path, expected: Original) -> None:
    """Raises a `UserError` if a file at hand is not the original."""
    size, sha256 = path.stat().st_size, file_sha256(path)
    if (size, sha256) != (expected.size, expected.sha256):
        raise UserError(
            f"{path} is damaged: {size} bytes, SHA-256 {sha256[:12]}, where the original has "
            f"{expected.size} bytes, SHA-256 {expected.sha256[:12]}; delete it and fetch it again "
            f"from {expected.url}"
        )


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
