"""The TensorFlow Datasets builder for text8; importing it needs `tensorflow_datasets`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.datasets.text8 import read_text

BLOCK = 1_000_000  # characters an example; TFDS is slow with one example of 100 MB


class Text8Blocks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The text in consecutive blocks, in order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, text_path: Path, **kwargs: Any) -> None:
        """The text comes from the file `text_path`."""
        self.text_path = text_path
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Wikipedia's text in lower-case letters and spaces, in blocks.",
            homepage="http://mattmahoney.net/dc/textdata.html",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,  # the blocks are consecutive text
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"text": self._generate_examples(self.text_path)}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict]]:
        text = read_text(path)
        for start in range(0, len(text), BLOCK):
            yield start, {"text": text[start : start + BLOCK]}
