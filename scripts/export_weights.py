"""Exports the best checkpoint of a run as one NumPy file.

    python -m scripts.export_weights --workdir=runs/pmnist_bn_lstm --output=pmnist_bn_lstm.npz

It needs only the folder of the run, not the data. The file holds the model's variables in float32,
compressed, under names such as `params/layer/recurrent_kernel`;
`flax.traverse_util.unflatten_dict(..., sep="/")` nests them again. The statistics of a BN-LSTM are
re-estimated population statistics if the run is finished, else running averages.
"""

from pathlib import Path

import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict

from experiments.records.checkpoints import read_best
from experiments.records.metrics import STATISTICS
from experiments.runtime import cli, files, paths
from experiments.runtime.errors import UserError


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("workdir", None, "Folder of a run.", required=True)
    paths.DEFINE_path("output", None, "File to write; its name ends with .npz.", required=True)


def main(_: list[str]) -> None:
    """Writes the file, and prints what it holds."""
    output = Path(flags.FLAGS.output)
    if output.suffix != ".npz":
        raise UserError(f"--output={output} must end with .npz")
    update, variables, statistics = read_best(Path(flags.FLAGS.workdir))
    arrays = {
        name: np.asarray(array, np.float32)
        for name, array in flatten_dict(variables, sep="/").items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(output) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    size = sum(array.size for array in arrays.values())
    print(
        f"{output}: {size:,} values in {output.stat().st_size / 1e6:.1f} MB, update {update:,}, "
        f"{STATISTICS[statistics]}"
    )


if __name__ == "__main__":
    cli.run(main, define_flags)
