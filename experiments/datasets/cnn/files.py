"""The original files of the CNN data set: found, unpacked, listed and verified.

A question is a file `<SHA-1 of its bytes>.question`, in the folder of its split.
"""

import hashlib
import math
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.datasets.originals import matching
from experiments.runtime.errors import UserError

ADDRESS = "https://cs.nyu.edu/~kcho/DMQA/"
FOLDERS = {"train": "training", "valid": "validation", "test": "test"}
SUFFIX = ".question"
PART = 500  # files that a process holds in memory
PIECE = 1 << 20  # bytes
GZIP = 31  # zlib's number for this format

# Where each file's bytes are, by name without suffix: offset and size.
Places = dict[str, tuple[int, int]]


class Part(NamedTuple):
    """Some of a split's files, in the order of their names.

    Attributes:
        split: Name of the split.
        container: The folder that holds the files, or a .tar file.
        places: Where in the .tar file they are; in a folder, 0 and -1.
    """

    split: str
    container: Path
    places: Places

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file."""
        in_folder = self.container.is_dir()
        for name, (offset, size) in self.places.items():
            path = self.container / f"{name}{SUFFIX}" if in_folder else self.container
            with path.open("rb") as file:
                file.seek(offset)
                yield name, file.read(size)

    def damaged(self) -> list[str]:
        """Names of the files that hold other bytes than their names say."""
        return [name for name, content in self.contents() if not _is_whole(name, content)]


def how_to_get(folder: Path | str) -> str:
    """What a person has to do to have the files in a folder, in one line."""
    return (
        f"download cnn.tgz, CNN's Questions, by hand from {ADDRESS} and place it, or the folder "
        f"cnn that it unpacks to, in {folder}"
    )


def find(source_dir: Path) -> Path:
    """The archive, or the unpacked folder `questions`, in `source_dir` or its subfolder `cnn`.

    Raises:
        UserError: If there is none, or there are several archives and none is `cnn.tgz`.
    """
    folders = (source_dir, source_dir / "cnn")
    for folder in folders:
        if (folder / "cnn.tgz").is_file():
            return folder / "cnn.tgz"
    for folder in (*folders, source_dir / "cnn" / "cnn"):
        if (folder / "questions").is_dir():
            return folder / "questions"
    archives = sorted(path for folder in folders for path in matching(folder, "cnn*.tgz"))
    if not archives:
        raise UserError(f"CNN is not in {source_dir}: {how_to_get(source_dir / 'cnn')}")
    if len(archives) > 1:
        raise UserError(
            f"{' and '.join(map(str, archives))} are there, and CNN is in one of them: "
            "rename it to cnn.tgz"
        )
    return archives[0]


def list_parts(path: Path, work_dir: Path) -> list[Part]:
    """All files, in the order of splits and names.

    Args:
        path: The archive or folder, as `find` gives it.
        work_dir: Folder to which an archive is unpacked, unless that was done before.

    Raises:
        UserError: If the archive is damaged, or a split has no files.
    """
    if path.is_dir():
        containers = {split: path / folder for split, folder in FOLDERS.items()}
        places = {split: _in_folder(folder) for split, folder in containers.items()}
    else:
        tar = _unpacked(path, work_dir)
        containers = dict.fromkeys(FOLDERS, tar)
        places = _in_tar(tar, path)
    for split, folder in FOLDERS.items():
        if not places[split]:
            raise damaged(path, f"has no questions in its folder {folder}")
    parts = []
    for split, container in containers.items():
        files = sorted(places[split].items())
        for start in range(0, len(files), PART):
            parts.append(Part(split, container, dict(files[start : start + PART])))
    return parts


def damaged(path: Path, problem: str) -> UserError:
    """The error to raise if something is wrong with the archive or folder."""
    if path.is_dir():
        return UserError(f"{path} {problem}: delete that folder and unpack cnn.tgz again")
    return UserError(f"{path} {problem}: delete it, {how_to_get(path.parent)}")


def _is_whole(name: str, content: bytes) -> bool:
    """Whether a file holds what its name says; an editor may have ended its last line."""
    return any(
        hashlib.sha1(version).hexdigest() == name
        for version in (content, content.removesuffix(b"\n"))
    )


def _name(file: str) -> str | None:
    """The name of a question's file without suffix; None for any other file."""
    is_question = file.endswith(SUFFIX) and not file.startswith(".")
    return file.removesuffix(SUFFIX) if is_question else None


def _in_folder(folder: Path) -> Places:
    files = os.listdir(folder) if folder.is_dir() else []
    return {name: (0, -1) for file in files if (name := _name(file))}


def _in_tar(tar: Path, archive: Path) -> dict[str, Places]:
    places = {folder: {} for folder in FOLDERS.values()}
    try:
        with tarfile.open(tar, "r:") as members:
            while member := members.next():
                members.members.clear()  # it would keep half a gigabyte of them
                *_, parent, folder, file = ("", "", *member.name.split("/"))
                if parent == "questions" and folder in places and (name := _name(file)):
                    places[folder][name] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise damaged(archive, f"holds a damaged .tar file ({error})") from error
    return {split: places[folder] for split, folder in FOLDERS.items()}


def _unpacked(archive: Path, work_dir: Path) -> Path:
    """The .tar file of an archive: unlike the archive it can be read from anywhere."""
    from experiments.runtime.progress import track  # here because the processes need no JAX

    status = archive.stat()
    path = work_dir / f"{archive.stem}-{status.st_size}-{status.st_mtime_ns}.tar"
    if path.exists():
        return path
    temporary = path.with_suffix(".tmp")
    stream = zlib.decompressobj(GZIP)
    with archive.open("rb") as packed, temporary.open("wb") as file:
        pieces = iter(lambda: packed.read(PIECE), b"")
        for piece in track(pieces, f"Unpacking {archive}", math.ceil(status.st_size / PIECE)):
            try:
                file.write(stream.decompress(piece))
            except zlib.error as error:
                raise damaged(archive, f"cannot be unpacked ({error})") from error
    if not stream.eof:
        raise damaged(archive, "cannot be unpacked (it ends too early)")
    os.replace(temporary, path)
    return path
