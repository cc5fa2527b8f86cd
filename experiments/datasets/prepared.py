"""Prepared data sets: `.npy` files with a manifest, made once and verified at every read."""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from experiments.runtime import paths
from experiments.runtime.errors import UserError, unknown_name
from experiments.runtime.files import lock

NAMES = ("babi", "cnn", "digits", "mnist", "ptb", "text8")  # the data sets, modules beside this one
FORMAT = 1  # of the prepared folder; raised when older folders can no longer be read

# The result of a data set's `prepare`: the arrays; metadata of JSON types; and the source of the
# data, with the names of the `packages` used.
Made = tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
      name: name of the data set, as given to `load`.
      arrays: the data by name, for example `train_images` [N, pixels].
      info: metadata of JSON types, for example the number of classes.
      digest: SHA-256 over the arrays' values, shapes and types and over `info`; it does not depend
        on the machine and library versions that prepared the data set.
    """

    name: str
    arrays: dict[str, np.ndarray]
    info: dict[str, Any]
    digest: str


def load(name: str, data_dir: str) -> Dataset:
    """Loads a data set, preparing it first if it is not prepared yet.

    Args:
      name: name of a data set.
      data_dir: folder of `prepared/<name>` and of original files.

    Raises:
      UserError: if there is no such data set, a prepared file is damaged or missing, or the data
        set cannot be prepared.
    """
    if prepare(name, data_dir, data_dir):
        logging.info("Prepared %s in %s", name, folder_of(name, data_dir))
    return read(folder_of(name, data_dir))


def folder_of(name: str, data_dir: str) -> Path:
    """The folder of a prepared data set.

    Raises:
      UserError: if there is no data set of this name, or `data_dir` is not a path.
    """
    if name not in NAMES:
        raise UserError(unknown_name("the data set", name, NAMES))
    return Path(paths.expand("data_dir", data_dir)) / "prepared" / name


def prepare(name: str, data_dir: str, source_dir: str) -> bool:
    """Prepares a data set from its original files, unless it is already prepared.

    If another process is preparing it, this waits.

    Args:
      name: name of a data set.
      data_dir: folder in which `prepared/<name>` is written.
      source_dir: folder of original files.

    Returns:
      Whether it was prepared now.

    Raises:
      UserError: if the original data cannot be obtained, a package is missing, or the folder cannot
        be written.
    """
    folder, source = folder_of(name, data_dir), Path(paths.expand("source_dir", source_dir))
    if os.path.exists(folder):  # unlike Path.exists, no error in an unreadable folder
        return False
    try:
        with _work_dir(folder) as work_dir:
            if os.path.exists(folder):
                return False
            module = importlib.import_module(f"experiments.datasets.{name}")
            arrays, info, origin = module.prepare(source, work_dir)
            arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
            write(folder, arrays, info, origin)
            return True
    except OSError as error:
        hint, failed = "", Path(str(error.filename or folder))
        if failed in (folder, *folder.parents) or folder.parent in failed.parents:
            command = f"python -m scripts.prepare_data {name}"
            hint = f"; to write elsewhere: {command} --data_dir=FOLDER --source_dir={source}"
        raise UserError(f"{name} cannot be prepared from {source}: {error}{hint}") from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} is not prepared yet, and preparing it needs the package {error.name}: "
            f"pip install -r requirements.txt, or copy {folder} from a machine where "
            f"python -m scripts.prepare_data {name} ran"
        ) from error


@contextlib.contextmanager
def _work_dir(folder: Path) -> Iterator[Path]:
    """A temporary folder beside a prepared folder, for one process at a time."""
    path = folder.with_name(f".{folder.name}-work")
    with _locked(path):
        try:
            for partial in folder.parent.glob(f".{folder.name}-{32 * '?'}"):
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed `write`
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Makes a folder and locks it, waiting for another process that has locked it."""
    place = path / "lock"  # NFS locks only files, not folders
    for attempt in itertools.count():
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = place.open("a")
        except FileNotFoundError:  # another process removed the folder, or none can be created
            if attempt == 100:
                raise
            continue
        with file:
            if not lock(file):
                logging.warning("Another process prepares data in %s: waiting for it", path)
                lock(file, wait=True)
            if place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat()):
                yield
                return


def write(
    folder: Path, arrays: dict[str, np.ndarray], info: dict[str, Any], source: dict[str, Any]
) -> None:
    """Writes a prepared folder in one step: it appears complete or not at all.

    If another process has written the folder in the meantime, that folder stays.

    Raises:
      OSError: if the folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        files = {}
        for name, array in arrays.items():
            path = partial / f"{name}.npy"
            np.save(path, array, allow_pickle=False)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        contents = _contents(arrays)
        packages = ["numpy", *source.get("packages", [])]
        manifest = {
            "format": FORMAT,
            "name": folder.name,
            "digest": _digest(contents, info),
            "info": info,
            "arrays": contents,
            "files": files,
            "source": source,
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in packages},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        (partial / "manifest.json").write_text(
            json.dumps(manifest, indent=2) + "\n", encoding="utf-8"
        )
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(folder: Path) -> Dataset:
    """Reads a prepared folder and verifies it.

    Raises:
      UserError: if a file is damaged or missing, or cannot be read.
    """
    try:
        return _read(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from error


def _read(folder: Path) -> Dataset:
    manifest = read_manifest(folder)
    arrays = {}
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise _unusable(path, "is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _unusable(path, f"is damaged: {size} bytes instead of {expected['bytes']}")
        if (found := file_sha256(path)) != expected["sha256"]:
            raise _unusable(
                path, f"is damaged: SHA-256 {found[:12]} instead of {expected['sha256'][:12]}"
            )
        try:  # memory-mapped, because some arrays are large
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            arrays[path.stem] = np.asarray(array)
        except (ValueError, EOFError) as error:  # also for pickled objects, which are not loaded
            raise _unusable(path, "is damaged: not an array of numbers") from error
    return Dataset(folder.name, arrays, manifest["info"], manifest["digest"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a prepared folder.

    Raises:
      UserError: if the manifest is missing, damaged or of another format version.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise _unusable(path, f"has format {manifest['format']}, this program reads {FORMAT}")
        if _digest(manifest["arrays"], manifest["info"]) != manifest["digest"]:
            raise _unusable(path, "is damaged: its digest does not match its contents")
        if set(manifest["files"]) != {f"{name}.npy" for name in manifest["arrays"]}:
            raise _unusable(path, "is damaged: its files do not match its arrays")
        for name, file in manifest["files"].items():
            if Path(name).name != name or {"bytes", "sha256"} - {*file}:
                raise _unusable(path, f"is damaged: invalid entry for {name!r}")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _unusable(path, "is missing") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _unusable(path, "is damaged: not a manifest") from error
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contents(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Shape, type and SHA-256 of each array's values.

    Only the values are hashed, because the header of a `.npy` file depends on numpy's version.
    """
    return {
        name: {
            "shape": list(array.shape),
            "dtype": array.dtype.str,
            "sha256": hashlib.sha256(array).hexdigest(),
        }
        for name, array in arrays.items()
    }


def _digest(contents: dict[str, dict[str, Any]], info: dict[str, Any]) -> str:
    canonical = json.dumps({"arrays": contents, "info": info}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _unusable(path: Path, problem: str) -> UserError:
    folder = path.parent
    return UserError(
        f"{path} {problem}; delete the folder {folder} and run "
        f"python -m scripts.prepare_data {folder.name} --data_dir={folder.parent.parent}"
    )
