"""Prepares a data set once, so that runs only read it.

Usage: python -m scripts.prepare_data NAME --data_dir=FOLDER [--source_dir=FOLDER]

NAME is the name of a data set, for example mnist or digits. The prepared arrays go to
DATA_DIR/prepared/NAME. Where they are there already, they are verified.
"""

import json
import time
from pathlib import Path
from typing import Any

from experiments import cli, errors, paths
from experiments.datasets import prepared

DATA_DIR = paths.DEFINE_path(
    "data_dir", None, "Folder to write to, the same that runs are given.", required=True
)
SOURCE_DIR = paths.DEFINE_path(
    "source_dir", None, "Folder with original files, if not --data_dir; it is only read."
)


def main(argv: list[str]) -> None:
    """Prepares or verifies the data set named on the command line and prints what is there."""
    if len(argv) != 2:
        raise errors.UserError(
            f"name one data set to prepare, of {', '.join(prepared.names())}; see --help"
        )
    name = argv[1]
    start = time.perf_counter()
    folder = prepared.folder_of(name, DATA_DIR.value)
    found = folder.exists()
    if not found:
        source_dir = Path(SOURCE_DIR.value or DATA_DIR.value).expanduser()
        try:
            with prepared.making(name, folder, source_dir) as made:
                if made:
                    prepared.write(folder, *made)
        except OSError as error:
            problem = error.strerror or error
            raise errors.UserError(f"{folder} cannot be written: {problem}") from error
    digest = prepared.read(folder).digest
    manifest = prepared.read_manifest(folder)
    seconds = time.perf_counter() - start

    print(f"{name} {'is there already' if found else 'was prepared'}, verified ({seconds:.1f} s)")
    for array, content in manifest["arrays"].items():
        file = manifest["files"][f"{array}.npy"]
        print(
            f"  {folder / array}.npy  {content['dtype']} {content['shape']}  "
            f"{file['bytes']:,} bytes  SHA-256 {file['sha256'][:12]}"
        )
    for key, value in manifest["info"].items():
        print(f"  {key}: {_told(value)}")
    versions = ", ".join(f"{package} {number}" for package, number in manifest["versions"].items())
    print(f"  digest {digest}\n  prepared {manifest['date']} with {versions}")


def _told(value: Any) -> str:
    """Metadata in a line; of a list, its length."""
    if isinstance(value, dict):
        inside = ((key, _told(item)) for key, item in value.items())
        items = [f"{key} ({told})" if " " in told else f"{key} {told}" for key, told in inside]
        return ", ".join(items) or "none"
    if isinstance(value, list):
        return f"{len(value):,}"
    return json.dumps(value)


if __name__ == "__main__":
    cli.run(main)
