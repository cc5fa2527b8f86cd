"""Penn Treebank as characters: Mikolov's split, through TensorFlow Datasets without TensorFlow.

As in the paper: words outside the 10,000 most frequent read `<unk>`, numbers read `N`, the space
that starts every line of the original files is dropped, and every line ends with its newline.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets.originals import Originals, examples
from experiments.datasets.prepared import Made

ORIGINALS = Originals.beside(__file__, "Penn Treebank")
SPLITS = ("train", "valid", "test")


def prepare(source_dir: Path) -> Made:
    """Makes the arrays from the original files, downloading those that are not at hand.

    Args:
        source_dir: Folder in which, or in whose subfolder `ptb`, the three original files
            `ptb.{train,valid,test}.txt` are looked for.

    Returns:
        The arrays `train`, `valid` and `test` uint8 [N] of symbols, N being 5,059,550, 396,412
        and 446,184; the metadata: symbol i is the i-th character of `vocabulary`; the source.

    Raises:
        UserError: If an original file is damaged, if one is missing and cannot be downloaded,
            or if TensorFlow Datasets is not installed.
    """
    with ORIGINALS.built(source_dir, _builder) as (builder, source):
        texts = {
            split: b"".join(
                line["text"].removeprefix(b" ") + b"\n" for line in examples(builder, split)
            )
            for split in SPLITS
        }
    symbols = bytes(sorted(set(texts["train"])))  # validation and test text have no others
    table = bytes.maketrans(symbols, bytes(range(len(symbols))))
    arrays = {
        split: np.frombuffer(text.translate(table), np.uint8) for split, text in texts.items()
    }
    return arrays, {"vocabulary": symbols.decode("ascii")}, source


def _builder(paths: dict[str, Path], data_dir: Path) -> Any:
    from experiments.datasets.ptb.builder import PtbLines

    return PtbLines(paths=paths, data_dir=data_dir)
