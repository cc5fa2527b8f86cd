"""Tests of the commands in scripts/, on very small runs."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import text

LETTERS = "abcdefg T\n"


def text_config(folder: Path, kind: str) -> ConfigDict:
    """Writes a short random text into `folder`; returns a small model's config, 9 time steps."""
    file = folder / "letters.txt"
    file.write_text("".join(np.random.default_rng(0).choice(list(LETTERS), 3000)))
    config = text.get_config()
    config.text_file = str(file)
    config.segment_length = 10
    config.batch_size = 16
    config.num_updates = config.eval_every = config.log_every = config.checkpoint_every = 3
    config.model.kind = kind
    config.model.features = 8
    return config
