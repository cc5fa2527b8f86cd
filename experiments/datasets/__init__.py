"""Data sets as plain arrays, prepared once under `<data_dir>/prepared/<name>`.

A new data set is a module here, and its name in `prepared.NAMES`. The module offers
`prepare(source_dir, work_dir)`, which returns the arrays, their metadata, and where they came from.
`digits.py` is the smallest, `ptb.py` the smallest with original files that are downloaded. Arrays
and metadata have the names that the task reads: those of `digits.py` for images (add the data set
to the `DATASETS` of `experiments.tasks.sequential_images`), of `ptb.py` for characters (`corpus.py`
reads them: add a text to its `DATASETS` and `load`), and of `babi.py` for questions.

`originals` finds, verifies and downloads original files; `examples` reads them through TensorFlow
Datasets. `corpus` and `questions` make what tasks train on from prepared arrays.
"""

from experiments.datasets.prepared import Dataset, load

__all__ = ["Dataset", "load"]
