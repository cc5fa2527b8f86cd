"""Data sets as plain arrays: one module or package here for each, named as the data set.

Such a module offers `prepare(source_dir)`, which returns the arrays, a metadata dict and a record
of where the data came from. `load` keeps the result under `<data_dir>/prepared/<name>`.

`originals` finds, verifies and downloads the original files that such a module starts from.
`corpus` makes the text of a language model from a data set or from any text file.
"""

from experiments.datasets.prepared import Dataset, load

__all__ = ["Dataset", "load"]
