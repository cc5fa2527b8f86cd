"""Prepares a data set once, so that runs only read it.

Usage: python -m scripts.prepare_data NAME --data_dir=FOLDER [--source_dir=FOLDER]

NAME is the name of a data set: babi, cnn, digits, mnist, ptb or text8. The prepared arrays go to
DATA_DIR/prepared/NAME. If they exist already, they are verified.

Original files are taken from SOURCE_DIR or its subfolder NAME, and verified. Missing files are
downloaded, each from the first address that serves it. These files are found:

  babi   tasks_1-20_v1-2.tar.gz, or unpacked: tasks_1-20_v1-2/ or its folder en-10k/
  cnn    cnn.tgz, or unpacked: cnn/ or its folder questions/ (not downloaded)
  mnist  the four *-ubyte.gz, or unpacked; also in MNIST/raw/, where torchvision leaves them
  ptb    ptb.train.txt, ptb.valid.txt, ptb.test.txt
  text8  text8.zip, or unpacked: text8; or its first N characters: text8_first_<N>.gz
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments.datasets import prepared
from experiments.runtime import cli, errors, paths


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path(
        "data_dir", None, "Folder to write to; runs take it as --config.data_dir.", required=True
    )
    paths.DEFINE_path(
        "source_dir", None, "Folder with original files, if not --data_dir; it is only read."
    )


def main(argv: list[str]) -> None:
    """Prepares or verifies the data set named on the command line, and describes it."""
    if len(argv) != 2:
        raise errors.UserError(
            f"name one data set to prepare, of {', '.join(prepared.NAMES)}; see --help"
        )
    given, name = flags.FLAGS, argv[1]
    start = time.perf_counter()
    folder = prepared.folder_of(name, given.data_dir)
    if given.source_dir and not os.path.isdir(given.source_dir):
        raise errors.UserError(f"--source_dir={given.source_dir} is not a folder")
    made = prepared.prepare(name, given.data_dir, given.source_dir or given.data_dir)
    prepared.read(folder)
    seconds = time.perf_counter() - start
    print(f"{name} {'was prepared' if made else 'was prepared before'}, verified ({seconds:.1f} s)")
    print("\n".join(described(folder)))


def described(folder: Path) -> list[str]:
    """Lines that describe the content of a prepared folder."""
    manifest = prepared.read_manifest(folder)
    lines = []
    for array, content in manifest["arrays"].items():
        file = manifest["files"][f"{array}.npy"]
        lines.append(
            f"{folder / array}.npy  {content['dtype']} {content['shape']}  "
            f"{file['bytes']:,} bytes  SHA-256 {file['sha256'][:12]}"
        )
    lines += [f"{key}: {_in_a_line(value)}" for key, value in manifest["info"].items()]
    versions = ", ".join(f"{package} {number}" for package, number in manifest["versions"].items())
    lines += [f"digest {manifest['digest']}", f"prepared {manifest['date']} with {versions}"]
    return [f"  {line}" for line in lines]


def _in_a_line(value: Any) -> str:
    """Metadata as one line; a list is given by its length."""
    if isinstance(value, dict):
        inside = ((key, _in_a_line(item)) for key, item in value.items())
        items = [f"{key} ({text})" if " " in text else f"{key} {text}" for key, text in inside]
        return ", ".join(items) or "none"
    return f"{len(value):,}" if isinstance(value, list) else json.dumps(value)


if __name__ == "__main__":
    cli.run(main, define_flags, flags.FLAGS)
