"""Data sets as plain arrays, prepared once under `<data_dir>/prepared/<name>`.

To add a data set, add a module here, and its name to `prepared.NAMES`. The module has a function
`prepare(source_dir, work_dir)`, which returns the arrays, their metadata, and their source.
`digits.py` is the smallest module, `ptb.py` the smallest that downloads original files. Arrays and
metadata have the names that the task reads:

- Images: as in `digits.py`. Add the data set to `experiments.tasks.sequential_images.DATASETS`.
- Characters: as in `ptb.py`. Add the text to `DATASETS` and `load` in `corpus.py`.
- Questions: as in `babi.py`.

`originals` finds, verifies and downloads original files; `examples` reads them through TensorFlow
Datasets. `corpus` and `questions` turn prepared arrays into the data of tasks.
"""

from experiments.datasets.prepared import Dataset, load

__all__ = ["Dataset", "load"]
