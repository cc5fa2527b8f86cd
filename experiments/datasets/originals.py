"""Original files of data sets: found in a folder and verified, or downloaded."""

import dataclasses
import fnmatch
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import requests
import urllib3

from experiments.datasets.prepared import file_sha256
from experiments.runtime.errors import UserError
from experiments.runtime.progress import track

TIMEOUT = 5, 60  # seconds to connect, and to wait for the next bytes
BLOCK = 1 << 20  # bytes

T = TypeVar("T")


class Original(NamedTuple):
    """An original file.

    Attributes:
      name: file name.
      size: in bytes.
      sha256: in hexadecimal.
      urls: where it can be downloaded, in the order in which they are tried.
      unpacked: the file that it unpacks to, also accepted.
    """

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...] = ()
    unpacked: "Original | None" = None

    def check(self, path: Path) -> None:
        """Raises a `UserError` if the file at `path` is not this one."""
        size = path.stat().st_size
        if (size, (sha256 := file_sha256(path))) != (self.size, self.sha256):
            raise UserError(
                f"{path} is damaged: {size} bytes, SHA-256 {sha256[:12]}, where the original has "
                f"{self.size} bytes, SHA-256 {self.sha256[:12]}; delete it"
            )


@dataclasses.dataclass(frozen=True)
class Originals:
    """The original files of a data set.

    Attributes:
      name: name of the data set, and of the subfolder in which its files may lie.
      title: what messages call it.
      files: the files.
      folders: other subfolders in which files may lie.
    """

    name: str
    title: str
    files: tuple[Original, ...] = ()
    folders: tuple[str, ...] = ()

    def get(self, source_dir: Path, work_dir: Path) -> tuple[dict[str, Path], list[dict[str, Any]]]:
        """Finds and verifies the files, and downloads those that are missing.

        Args:
          source_dir: folder that may have the files, directly or in its subfolders.
          work_dir: folder for downloads.

        Returns:
          The path of each file, by the name of its packed form; and each file's entry for the
          manifest.

        Raises:
          UserError: if a file is damaged, or is missing and cannot be downloaded.
        """
        found = {file.name: self._find(file, source_dir) for file in self.files}
        missing = [name for name, place in found.items() if place is None]
        paths, records = {}, []
        for file in self.files:
            path, form = found[file.name] or (work_dir / file.name, file)
            url = None
            if file.name in missing:
                url, _ = self.download(file.urls, path, file.check, missing, source_dir)
            paths[file.name] = path
            facts = {"name": form.name, "size": form.size, "sha256": form.sha256}
            records.append(facts | {"downloaded_from": url})
        return paths, records

    def _find(self, file: Original, source_dir: Path) -> tuple[Path, Original] | None:
        """Path and form of an existing file, or None; raises a `UserError` if it is damaged."""
        for folder in (source_dir / name for name in ("", self.name, *self.folders)):
            for form in (file, file.unpacked):
                if form and (path := folder / form.name).is_file():
                    try:
                        form.check(path)
                    except UserError as error:
                        raise UserError(f"{error} and fetch it again from {file.urls[0]}") from None
                    return path, form
        return None

    def download(
        self,
        urls: Sequence[str],
        path: Path,
        check: Callable[[Path], T],
        missing: Sequence[str],
        source_dir: Path,
    ) -> tuple[str, T]:
        """Downloads a file from the first address that has the original.

        Args:
          urls: the addresses.
          path: where to write it.
          check: raises a `UserError` if the file at the path is not the original.
          missing: names of all missing files, for the message.
          source_dir: the user's folder for original files, for the message.

        Returns:
          The address, and what `check` returned.

        Raises:
          UserError: if no address has it. The message gives each address's answer.
        """
        problems = []
        for url in urls:
            try:
                _fetch(url, path)
                return url, check(path)
            except UserError:
                problems.append(f"{url} (sent another file)")
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                problems.append(f"{url} ({_reason(error)})")
        raise UserError(
            f"{self.title} cannot be downloaded from {' or '.join(problems)}: get "
            f"{', '.join(missing)} elsewhere, such as on a machine with network, and place "
            f"{'it' if len(missing) == 1 else 'them'} in the folder {source_dir / self.name}"
        )


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder whose names match, sorted; none if there is no such folder.

    Raises:
      OSError: if the folder cannot be read; `Path.glob` would take it for an empty one.
    """
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(fnmatch.filter(names, pattern))]


def _fetch(url: str, path: Path) -> None:
    """Downloads a file, with a progress bar."""
    headers = {"Accept-Encoding": "identity"}  # the bytes as they are stored
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        size = int(response.headers.get("Content-Length", 0))
        blocks: Iterator[bytes] = iter(functools.partial(response.raw.read, BLOCK), b"")
        with path.open("wb") as file:
            file.writelines(track(blocks, f"Downloading {url}", math.ceil(size / BLOCK)))


def _reason(error: BaseException) -> str:
    """Why a download failed, in a few words: the host's status, or the error of the network."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"{response.status_code} {response.reason or ''}".strip()
    while inner := error.__cause__ or error.__context__:
        error = inner
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split())
