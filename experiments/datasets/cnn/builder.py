"""The TensorFlow Datasets builder for CNN; importing it needs `tensorflow_datasets`."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from experiments.datasets.cnn.files import ADDRESS, Part, how_to_get
from experiments.datasets.question_arrays import ENTITY

FEATURES = ("name", "passage", "question", "answer", "entities", "problem")


class CnnQuestions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """CNN, a file an example, in the order of their names.

    An example whose `problem` is not empty is no proper question, and has nothing but its name.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = how_to_get("the data folder")

    def __init__(self, *, parts: list[Part], **kwargs: Any) -> None:
        """The questions come from the files of `parts`: all of them, or some."""
        self.parts = parts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="News of CNN, and questions on them with one entity as the answer.",
            homepage=ADDRESS,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in FEATURES}),
            disable_shuffling=True,  # the order of names, which are hashes, is as good
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        splits = dict.fromkeys(part.split for part in self.parts)
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        contents = (
            content for part in self.parts if part.split == split for content in part.contents()
        )
        for index, (name, content) in enumerate(contents):
            example = dict.fromkeys(FEATURES, "") | {"name": name}
            try:
                example |= parse(content)
            except ValueError as error:
                example["problem"] = str(error)
            yield index, example


def parse(content: bytes) -> dict[str, str]:
    """The texts of a question's file.

    Raises:
        ValueError: If it holds no proper question; the message says why in a few words.
    """
    try:
        blocks = content.decode().split("\n\n", 4)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    if len(blocks) < 5 or not all(block.strip() for block in blocks[3:]):
        raise ValueError("missing block")
    passage, question, answer = (block.strip().replace("\n", " ") for block in blocks[1:4])
    for name, text in {"passage": passage, "question": question}.items():
        if not text:
            raise ValueError(f"empty {name}")
    if not answer.startswith(ENTITY) or answer not in passage.split(" "):
        raise ValueError("answer that is no entity of the passage")
    return {"passage": passage, "question": question, "answer": answer, "entities": blocks[4]}
