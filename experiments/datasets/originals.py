"""Original files of data sets: found in a folder and verified, or downloaded, and read by TFDS."""

import contextlib
import csv
import dataclasses
import fnmatch
import functools
import importlib
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from experiments.datasets.prepared import file_sha256
from experiments.runtime.errors import UserError

CONNECT_SECONDS, READ_SECONDS = 5, 60  # for each of a host's addresses; for the next bytes
ANSWER_SECONDS = 10  # in all, because looking a name up has no timeout of its own
BLOCK = 1 << 20  # bytes


class Original(NamedTuple):
    """An original file, the rows of its name in `checksums.tsv`.

    Attributes:
        name: File name.
        size: In bytes.
        sha256: In hexadecimal.
        urls: Where it can be downloaded, in the order in which they are tried.
    """

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...] = ()

    def is_at(self, path: Path) -> bool:
        """Whether a file is the original."""
        return (path.stat().st_size, file_sha256(path)) == (self.size, self.sha256)


@dataclasses.dataclass(frozen=True)
class Originals:
    """The original files of a data set.

    Attributes:
        name: Name of the data set, and of the subfolder in which its files may lie.
        title: What messages call it.
        files: The files.
        unpacked: Size and SHA-256 of a `.gz` file's contents, by its name without `.gz`: such a
            file is as good.
        folders: Other subfolders in which files may lie.
    """

    name: str
    title: str
    files: tuple[Original, ...] = ()
    unpacked: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    folders: tuple[str, ...] = ()

    @classmethod
    def beside(cls, module_file: str, title: str, **fields: Any) -> "Originals":
        """The files that `checksums.tsv` lists beside the module of a data set's package.

        A row has an address, the size, the SHA-256 and the name of a file.
        """
        folder = Path(module_file).parent
        files: dict[str, Original] = {}
        with (folder / "checksums.tsv").open(newline="") as table:
            for url, size, sha256, name in csv.reader(table, delimiter="\t"):
                urls = files[name].urls if name in files else ()
                files[name] = Original(name, int(size), sha256, (*urls, url))
        return cls(folder.name, title, tuple(files.values()), **fields)

    @contextlib.contextmanager
    def built(
        self, source_dir: Path, builder: Callable[[dict[str, Path], Path], Any]
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Prepares a TFDS builder in a temporary folder, downloading the files not at hand.

        Args:
            source_dir: Folder in which, or in whose subfolders, the files are looked for.
            builder: Makes the builder for the paths of the files, by name, and a `data_dir`. Called
                when TFDS is known to be there.

        Yields:
            The builder, to be read within the context; and the source for the manifest.

        Raises:
            UserError: If a file is damaged, if one is missing and cannot be downloaded, or if
                TensorFlow Datasets is not installed.
        """
        found = self._at_hand(source_dir)
        self.require_packages(source_dir)
        missing = [file for file in self.files if file.name not in found]
        urls: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix=f"{self.name}-") as work_dir:
            for file in missing:
                path = Path(work_dir) / file.name
                names = [file.name for file in missing]
                urls[file.name] = self.download(file.urls, path, file.is_at, names, source_dir)
                found[file.name] = path, file
            built = builder({name: path for name, (path, _) in found.items()}, Path(work_dir))
            with _quiet():
                built.download_and_prepare(file_format="array_record")
            files = [
                {"name": form.name, "size": form.size, "sha256": form.sha256}
                | {"downloaded_from": urls.get(name)}
                for name, (_, form) in found.items()
            ]
            yield built, {"files": files, "packages": ["tensorflow-datasets", "array_record"]}

    def _at_hand(self, source_dir: Path) -> dict[str, tuple[Path, Original]]:
        """Path and form of each file at hand, by name; raises a `UserError` if it is damaged."""
        found = {}
        for file in self.files:
            for path, form in self._places(file, source_dir):
                if path.is_file():
                    _check(path, form, file.urls[0])
                    found[file.name] = path, form
                    break
        return found

    def _places(self, file: Original, source_dir: Path) -> Iterator[tuple[Path, Original]]:
        """Where a file may lie, and in which form."""
        forms = [file]
        stem = file.name.removesuffix(".gz")
        if stem in self.unpacked:
            forms.append(Original(stem, *self.unpacked[stem]))
        for folder in ("", self.name, *self.folders):
            for form in forms:
                yield source_dir / folder / form.name, form

    def download(
        self,
        urls: Sequence[str],
        path: Path,
        is_original: Callable[[Path], bool],
        missing: Sequence[str],
        source_dir: Path,
    ) -> str:
        """Downloads a file from the first address that has the original.

        Args:
            urls: The addresses.
            path: Where to write it.
            is_original: Whether the file that was written is the original.
            missing: Names of all files that are not at hand, for the message.
            source_dir: Folder that the user has for them.

        Returns:
            The address.

        Raises:
            UserError: If no address has it. The message says what each answered.
        """
        import requests
        import urllib3

        from experiments.runtime.progress import track  # here because CNN's processes need no JAX

        problems = []
        for url in urls:
            try:
                with _open(url) as response, path.open("wb") as file:
                    size = int(response.headers.get("Content-Length", 0))
                    blocks = iter(functools.partial(response.raw.read, BLOCK), b"")
                    file.writelines(track(blocks, f"Downloading {url}", math.ceil(size / BLOCK)))
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                problems.append(f"{url} ({_reason(error)})")
                continue
            if is_original(path):
                return url
            problems.append(f"{url} (sent another file)")
        raise UserError(
            f"{self.title} cannot be downloaded from {' or '.join(problems)}: get "
            f"{', '.join(missing)} elsewhere, as on a machine with network, and place "
            f"{'it' if len(missing) == 1 else 'them'} in the folder {source_dir / self.name}"
        )

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


def examples(builder: Any, split: str) -> list[dict[str, Any]]:
    """All examples of a split, in order."""
    records = builder.as_data_source(split)
    return records.__getitems__(range(len(records)))  # four times as fast as iterating


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder whose names match, sorted; none if there is no such folder.

    Raises:
        OSError: If the folder cannot be read, which `Path.glob` takes for an empty one.
    """
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(fnmatch.filter(names, pattern))]


def _check(path: Path, form: Original, url: str) -> None:
    """Raises a `UserError` if a file at hand is not the original, which `url` has."""
    if not form.is_at(path):
        raise UserError(
            f"{path} is damaged: {path.stat().st_size} bytes, SHA-256 {file_sha256(path)[:12]}, "
            f"where the original has {form.size} bytes, SHA-256 {form.sha256[:12]}; delete it and "
            f"fetch it again from {url}"
        )


def _open(url: str) -> Any:
    """Begins a download and returns its `requests.Response`.

    Raises:
        requests.RequestException: If the host does not answer soon, or not with the file.
    """
    import requests

    answer: Future = Future()

    def ask() -> None:
        try:
            timeout = CONNECT_SECONDS, READ_SECONDS
            headers = {"Accept-Encoding": "identity"}  # the bytes as they are stored
            answer.set_result(requests.get(url, headers=headers, stream=True, timeout=timeout))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answer.result(timeout=ANSWER_SECONDS)
    except TimeoutError:
        raise requests.Timeout("no answer") from None
    response.raise_for_status()
    return response


def _reason(error: Exception) -> str:
    """Why a download failed, in a few words: the host's status, or what the network's error was."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"{response.status_code} {response.reason or ''}".strip()
    cause: BaseException = error
    while inner := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
        cause = inner
    words = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(words.split())


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
