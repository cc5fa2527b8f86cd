"""The TensorFlow Datasets builder for bAbI; importing it needs `tensorflow_datasets`."""

import re
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds


class BabiStories(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """bAbI, a story with its questions an example, in original order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, texts: dict[str, str], **kwargs: Any) -> None:
        """Each of the original `texts` becomes the split of its name."""
        self.texts = texts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Short stories with questions, as numbered lines, story by story.",
            homepage="https://research.facebook.com/downloads/babi/",
            features=tfds.features.FeaturesDict({"story": tfds.features.Text()}),
            disable_shuffling=True,  # questions are numbered, and the last stories validate
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {name: self._generate_examples(text) for name, text in self.texts.items()}

    def _generate_examples(self, text: str) -> Iterator[tuple[int, dict]]:
        # A line numbered 1 starts a story.
        for index, story in enumerate(re.split(r"^(?=1 )", text, flags=re.MULTILINE)[1:]):
            yield index, {"story": story}
