"""Times BN-LSTM and LSTM with every implementation, beside Flax's and PyTorch's layers.

    python -m scripts.benchmark
    python -m scripts.benchmark --sizes=ptb --dtypes=float32 --passes=update --device=cpu

Layers have the sizes of the paper's experiments; inputs and parameters are random. `forward` is a
training pass with batch statistics; `update` adds the gradient and a step of gradient descent.

Each round measures every candidate once. Float32 products have JAX's default precision. Memory
excludes a pass's arguments. It is XLA's own figure; for PyTorch on a GPU it is the peak. The file
holds the seconds of every round, and the machine, versions, commit and date.
"""

from pathlib import Path

from absl import flags

from bnlstm_jax.recurrence import available
from experiments.benchmarking import benchmark, timing
from experiments.benchmarking.programs import DTYPES, PASSES, SIZES
from experiments.runtime import cli, paths
from experiments.runtime.errors import UserError

FLAGS = ("sizes", "dtypes", "passes", "device", "rounds", "small")  # recorded in the file


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list("sizes", list(SIZES), f"Sizes to time, of {', '.join(SIZES)}.")
    flags.DEFINE_list("dtypes", list(DTYPES), f"Dtypes of operands, of {', '.join(DTYPES)}.")
    flags.DEFINE_list("passes", list(PASSES), f"Passes to time, of {', '.join(PASSES)}.")
    flags.DEFINE_list("implementations", None, "Implementations; by default all that run here.")
    flags.DEFINE_enum("device", None, timing.DEVICES, "Device; by default the one JAX chooses.")
    flags.DEFINE_integer("rounds", 7, "Number of measurements of each candidate.", lower_bound=1)
    paths.DEFINE_path("output", "benchmark.json", "File for all results.")
    flags.DEFINE_bool("small", False, "Time tiny layers, for a quick test.")


def main(_: list[str]) -> None:
    """Prints a table for each pass, size and dtype, and writes the file after each."""
    given = flags.FLAGS
    for flag, known in (("sizes", SIZES), ("dtypes", DTYPES), ("passes", PASSES)):
        timing.check_names(flag, getattr(given, flag), known)
    paths.check_output(Path(given.output))
    timing.use_device(given.device)
    implementations = given.implementations or available()
    timing.check_names("implementations", implementations, available())
    if "xla" not in implementations:
        raise UserError("--implementations must include xla, the baseline of the comparison")
    sizes = {name: SIZES[name].small() if given.small else SIZES[name] for name in given.sizes}
    recorded = {name: getattr(given, name) for name in FLAGS}
    benchmark.run(
        sizes,
        given.dtypes,
        given.passes,
        dict.fromkeys(sizes, implementations),
        given.rounds,
        Path(given.output),
        recorded,
    )


if __name__ == "__main__":
    cli.run(main, define_flags)
