"""Compiles the CUDA kernel for GPUs that are not there: registers, spills and shared memory.

    python -m scripts.compile_cuda
    python -m scripts.compile_cuda --architectures=80,90

Needs CUDA's nvcc (a toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-cccl`), and no GPU. An
architecture that nvcc does not know is left out. That the kernel computes the right numbers, its
tests show by emulation, and scripts.validate_device on the device.
"""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from absl import flags

from bnlstm_jax.recurrence.native import build, cuda
from experiments.runtime import cli, markdown, progress
from experiments.runtime.errors import UserError


class GPU(NamedTuple):
    """A GPU: its name, multiprocessors, and bytes of shared memory that a block can have."""

    name: str
    processors: int
    shared_memory: int


GPUS = {  # of each architecture, one that people have
    "80": GPU("A100", 108, 163 * 1024),
    "86": GPU("GeForce RTX 3090", 82, 99 * 1024),
    "89": GPU("GeForce RTX 4090", 128, 99 * 1024),
    "90": GPU("H100", 132, 227 * 1024),
    "100": GPU("B200", 148, 227 * 1024),
    "120": GPU("GeForce RTX 5090", 170, 99 * 1024),
}
EMULATED = GPUS["90"]  # unless told otherwise
MOST_UNITS = 4096


class Kernel(NamedTuple):
    """What nvcc says of a kernel.

    Attributes:
      name: its mangled name.
      registers: of a thread.
      spilled: bytes that a thread writes for want of registers.
      stack: bytes of a thread's stack.
      shared: bytes of a block's shared memory, but for what is asked for at the start.
    """

    name: str
    registers: int
    spilled: int
    stack: int
    shared: int


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list("architectures", list(GPUS), "Without the dot, such as 90 for 9.0.")


def version() -> str:
    """Of nvcc, such as `release 13.0`."""
    said = build.run([build.find_nvcc(), "--version"]).stdout
    match = re.search(r"release [\d.]+", said)
    return match[0] if match else "of unknown release"


def known_architectures() -> list[str]:
    """Those that nvcc compiles for.

    Raises:
      RuntimeError: there is no nvcc.
    """
    listed = build.run([build.find_nvcc(), "--list-gpu-code"]).stdout
    return re.findall(r"^sm_(\d+)$", listed, re.MULTILINE)


def kernels(architecture: str) -> list[Kernel]:
    """The kernels, compiled for an architecture.

    Raises:
      RuntimeError: there is no nvcc, or it failed.
    """
    command = build.nvcc_command(cuda.SOURCE, architecture)
    with tempfile.TemporaryDirectory() as folder:
        output = ["-Xptxas=-v", "-o", str(Path(folder) / "kernel.so")]
        result = build.run([*command, *output])
    if result.returncode:
        first_line = result.stderr.strip().partition("\n")[0]
        raise RuntimeError(f"nvcc failed for sm_{architecture}: {first_line}")
    return parse(result.stderr)


def parse(log: str) -> list[Kernel]:
    """The kernels that a log of `ptxas -v` tells of."""

    def number(pattern: str, part: str) -> int:
        match = re.search(pattern, part)
        return int(match[1]) if match else 0

    return [
        Kernel(
            part.partition("'")[0],
            registers=number(r"Used (\d+) registers", part),
            spilled=number(r"(\d+) bytes spill stores", part),
            stack=number(r"(\d+) bytes stack frame", part),
            shared=number(r"(\d+) bytes smem", part),
        )
        for part in log.split("Compiling entry function '")[1:]
    ]


def largest_units(gpu: GPU, batch: int, in_bfloat16: bool) -> int:
    """The most hidden units that fit a GPU with one block on each multiprocessor."""
    library = cuda.load("cpu")
    library.BnlstmEmulate(gpu.processors, gpu.shared_memory)
    try:
        fitting = (h for h in range(MOST_UNITS, 0, -1) if library.BnlstmFits(h, batch, in_bfloat16))
        return next(fitting, 0)
    finally:
        library.BnlstmEmulate(EMULATED.processors, EMULATED.shared_memory)


def between(values: Iterable[int]) -> str:
    """Least and most."""
    values = sorted(values)
    return f"{values[0]} to {values[-1]}"


def main(_: list[str]) -> None:
    """Prints two tables."""
    given = flags.FLAGS
    try:
        known = known_architectures()
        resources, fits = [], []
        for name in progress.track(given.architectures, "compiling", len(given.architectures)):
            if name not in known:
                print(f"sm_{name} is left out: this nvcc knows {', '.join(known)}")
                continue
            found = kernels(name)
            spilling = [kernel for kernel in found if kernel.spilled]
            numbers = [len(found), between(k.registers for k in found), len(spilling)]
            numbers += [max(k.spilled for k in found), max(k.shared for k in found)]
            resources.append([f"sm_{name}", *map(str, numbers)])
            if gpu := GPUS.get(name):
                most = [
                    f"{largest_units(gpu, batch, in_bfloat16):,}"
                    for in_bfloat16 in (False, True)
                    for batch in cuda.BATCHES
                ]
                fits.append([gpu.name, str(gpu.processors), str(gpu.shared_memory // 1024), *most])
    except RuntimeError as error:
        raise UserError(str(error)) from error
    if not resources:
        raise UserError(f"--architectures names none that nvcc knows: {', '.join(known)}")
    header = ["for", "kernels", "registers", "that spill", "most bytes spilled", "static memory"]
    print(f"nvcc, {version()}\n\n{markdown.table(header, resources)}\n")
    header = ["GPU", "multiprocessors", "kB a block"]
    header += [f"{dtype}, {batch}" for dtype in ("float32", "bfloat16") for batch in cuda.BATCHES]
    print(f"Most hidden units that fit, by dtype and batch:\n\n{markdown.table(header, fits)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
