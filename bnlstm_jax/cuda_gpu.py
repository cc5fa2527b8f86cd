"""The recurrence over time in one CUDA kernel, forward, and one backward: cuda/recurrence.cu.

A scan in XLA starts several small programs at every step. Here the device's multiprocessors share
the hidden units, keep their part of the recurrent kernel, and go through all steps together; how is
said in the source. Unlike the other implementations this one is not made of the step of
`bnlstm_jax.cells`, but written out for (BN-)LSTMs, in float32.

The source is compiled at first use: by CUDA's `nvcc` where JAX has an NVIDIA GPU, and elsewhere by
a C++ compiler, with CUDA emulated on the CPU, which is slow and serves to test it.
"""

import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import shutil
import site
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bnlstm_jax.cells import Carry
from bnlstm_jax.implementations import default_device
from bnlstm_jax.normalization import Moments, Statistics

SOURCE = Path(__file__).parent / "cuda" / "recurrence.cu"
BATCHES = (32, 64, 128)  # to which a batch is padded
LARGEST_BATCH = BATCHES[-1]
VALID, IN_RECURRENT, IN_CELL = 1, 2, 4  # flags of a row at a step
TILE = 32  # to a multiple of which the rows that blocks exchange are padded
# What the backward pass has of the forward one is h, c, the recurrent term and statistics. Around
# `gpu` and what its arguments are made of, `jax.checkpoint` with this policy keeps no more.
_KEPT = "bnlstm_jax.cuda_gpu"
KEEP = jax.checkpoint_policies.save_only_these_names(_KEPT)


# ---- Building.


def find_nvcc() -> str:
    """CUDA's compiler: of `CUDA_HOME`, on the path, or of the packages that `jax[cuda13]` brings.

    Raises:
      RuntimeError: there is none.
    """
    places = [Path(site_packages) / "nvidia" for site_packages in site.getsitepackages()]
    places = [found for place in places for found in sorted(place.glob("cu*/bin/nvcc"))]
    if found := shutil.which("nvcc"):
        places.insert(0, Path(found))
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, Path(home) / "bin" / "nvcc")
    for place in places:
        if place.exists():
            return str(place)
    raise RuntimeError(
        "implementation 'gpu' is compiled at first use, and CUDA's nvcc is neither in CUDA_HOME "
        "nor on the PATH nor among Python's packages; install the CUDA toolkit, or the package "
        "nvidia-cuda-nvcc, or take implementation 'xla'"
    )


def build_command(platform: str, target: Path) -> list[str]:
    """The command that compiles the kernel for a platform of JAX."""
    if platform == "gpu":
        capability = default_device().compute_capability
        return nvcc_command(target, capability.replace(".", ""))
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError(
            "implementation 'gpu' runs on NVIDIA GPUs; to emulate it elsewhere, install g++"
        )
    return [compiler, "-O2", "-fPIC", *common(target), "-x", "c++", str(SOURCE)]


def nvcc_command(target: Path, architecture: str) -> list[str]:
    """The same for GPUs of an architecture, as `90` for Hopper."""
    nvcc = find_nvcc()
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    # Python's packages have the runtime where their nvcc does not look for it.
    libraries = Path(nvcc).resolve().parents[1] / "lib"
    options = ["-O3", code, "-Xcompiler=-fPIC", f"-L{libraries}"]
    return [nvcc, *options, *common(target), str(SOURCE)]


def common(target: Path) -> list[str]:
    """What both compilers are told. Warnings would be those of XLA's headers."""
    return ["-std=c++17", "-w", "-shared", "-isystem", jax.ffi.include_dir(), "-o", str(target)]


def build(platform: str) -> Path:
    """Compiles the kernel, or finds it compiled in `~/.cache/bnlstm_jax`.

    Raises:
      RuntimeError: there is no compiler, or it failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bnlstm_jax"
    cache.mkdir(parents=True, exist_ok=True)
    command = build_command(platform, Path("OUTPUT"))
    sources = [path.read_bytes() for path in sorted(SOURCE.parent.iterdir()) if path.is_file()]
    version = hashlib.sha256(repr((command, jax.__version__, sources)).encode()).hexdigest()[:16]
    target = cache / f"recurrence_{platform}_{version}.so"
    if not target.exists():
        logging.getLogger(__name__).info("compiling %s for %s, once", SOURCE.name, platform)
        # In a folder of its own until it is whole: other processes may do the same.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / target.name
            result = subprocess.run(
                build_command(platform, made), capture_output=True, text=True, check=False
            )
            if result.returncode:
                missing = "nv/target" in result.stderr  # of Python's packages one that JAX lacks
                hint = "; install the package nvidia-cuda-cccl" if missing else ""
                raise RuntimeError(f"{SOURCE} cannot be compiled{hint}:\n{result.stderr[-2000:]}")
            made.replace(target)
    return target


def platform() -> str:
    """Where the kernel would run: on a GPU, or emulated on a CPU."""
    return "gpu" if default_device().platform == "gpu" else "cpu"


@functools.cache
def load(platform: str) -> ctypes.CDLL:
    """The kernel's library, whose two calls are made known to XLA."""
    library = ctypes.CDLL(str(build(platform)))
    name = "CUDA" if platform == "gpu" else platform
    for call in ("Forward", "Backward"):
        handler = jax.ffi.pycapsule(getattr(library, f"Bnlstm{call}"))
        jax.ffi.register_ffi_target(f"bnlstm_{call.lower()}", handler, platform=name)
    return library


def padded(batch: int) -> int:
    """Rows that the kernel is given for a batch of at most `LARGEST_BATCH`."""
    return next(rows for rows in BATCHES if batch <= rows)


def refusal(units: int, batch: int, param_dtype: Any, dtype: Any) -> str | None:
    """Why the kernel cannot run so many units and sequences on this device; None if it can.

    Raises:
      RuntimeError: the kernel cannot be compiled.
    """
    operands = jnp.dtype(dtype or jnp.float32)
    if operands not in (jnp.float32, jnp.bfloat16) or jnp.dtype(param_dtype) != jnp.float32:
        return (
            "computes in float32, with products of float32 or bfloat16, and param_dtype is "
            f"{jnp.dtype(param_dtype)}, dtype {operands}"
        )
    if batch > LARGEST_BATCH:
        return f"takes up to {LARGEST_BATCH} sequences, and these are {batch}"
    if not load(platform()).BnlstmFits(units, padded(batch), operands == jnp.bfloat16):
        return (
            f"does not fit on this device with {units} units, {padded(batch)} rows and products "
            f"of {operands}"
        )
    return None


# ---- Calling. Within these calls arrays are [time, features, batch], the batch padded.


@dataclasses.dataclass(frozen=True)
class Options:
    """What a recurrence is like, apart from its arrays.

    Attributes:
      normalize_recurrent, normalize_cell: which terms are normalised.
      given: by statistics that are given; else by the batch's own.
      epsilon: added to variances.
      operands: dtype of the operands of recurrent products, float32 or bfloat16.
      units_of_block: hidden units that a block of threads has, 2, 4 or 8; 0 for as it fits best.
    """

    normalize_recurrent: bool
    normalize_cell: bool
    given: bool
    epsilon: float
    operands: str = "float32"
    units_of_block: int = 0

    def call(
        self,
        name: str,
        shapes: Sequence[tuple[int, ...]],
        *arrays: Array,
        aliases: dict[int, int] | None = None,
        **more: Any,
    ) -> list[Array]:
        """One of the kernel's two calls, with room for what its blocks exchange.

        `aliases` are inputs that are overwritten, and the results that then lie there.
        """
        kernel, *others = arrays
        kernel = kernel.astype(self.operands)
        units, gates = kernel.shape
        exchanged = units if name == "bnlstm_forward" else gates
        rows = -(-exchanged // TILE) * TILE
        room = jax.ShapeDtypeStruct((2, rows, arrays[1].shape[-1]), kernel.dtype)
        counter = jax.ShapeDtypeStruct((1,), jnp.uint32)
        results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        call = jax.ffi.ffi_call(
            name,
            (*results, room, counter),
            vmap_method="sequential",
            input_output_aliases=aliases,
        )
        attributes = dataclasses.asdict(self) | {"epsilon": np.float32(self.epsilon)} | more
        del attributes["operands"]  # which the kernel's dtype tells
        return call(kernel, *others, **attributes)[:-2]


class Inputs(NamedTuple):
    """What a recurrence is given, in float32.

    Attributes:
      kernel: the recurrent kernel `[H, 4H]`.
      pre_activation: input term and bias, `[T, 4H, B]`.
      flags: of rows, bytes `[T, B]`.
      recurrent_scale, cell_scale, cell_bias: `[4H]`, `[H]`, `[H]`.
      cell, hidden: the initial state, `[H, B]`.
      recurrent_statistics, cell_statistics: given mean and variance, `[T, 2, 4H]`, `[T, 2, H]`.
    """

    kernel: Array
    pre_activation: Array
    flags: Array
    recurrent_scale: Array
    cell_scale: Array
    cell_bias: Array
    cell: Array
    hidden: Array
    recurrent_statistics: Array
    cell_statistics: Array


def forward_call(options: Options, inputs: Inputs, keep: bool) -> tuple[Array, ...]:
    """Hidden states and cells `[T, H, B]`, recurrent terms `[T, 4H, B]`, statistics as given.

    Unless `keep`, of cells the last alone, and no recurrent terms. No statistics where given.
    """
    steps, gates, batch = inputs.pre_activation.shape
    units = gates // 4
    kept = steps if keep else 1
    found = 0 if options.given else steps
    shapes = (
        (steps, units, batch),
        (kept, units, batch),
        (steps if keep else 0, gates, batch),
        (found, 2, gates),
        (found, 2, units),
    )
    return options.call("bnlstm_forward", shapes, *inputs, keep=keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(options: Options, inputs: Inputs) -> tuple[Array, ...]:
    """Hidden states, the last cell, statistics of recurrent term and cell."""
    hidden, cell, _, *statistics = forward_call(options, inputs, keep=False)
    return hidden, cell[-1], *statistics


def _run_forward(options, inputs):
    kept = forward_call(options, inputs, keep=True)
    hidden, cell, recurrent_term, *statistics = (checkpoint_name(x, _KEPT) for x in kept)
    return (hidden, cell[-1], *statistics), (inputs, hidden, cell, recurrent_term, *statistics)


def _run_backward(options, residuals, gradients):
    inputs, hidden, cell, recurrent_term, *statistics = residuals
    by_hidden, by_cell, *_ = gradients
    if not options.given:
        inputs = inputs._replace(recurrent_statistics=statistics[0], cell_statistics=statistics[1])
    _, gates, batch = inputs.pre_activation.shape
    units = gates // 4
    of_terms, of_units = inputs.pre_activation.shape, (units, batch)
    by_pre, by_term, *by_params, by_first_cell, by_first_hidden = options.call(
        "bnlstm_backward",
        (of_terms, of_terms, (gates,), (units,), (units,), of_units, of_units),
        *inputs,
        cell,
        recurrent_term,
        by_hidden,
        by_cell,
        # Gradients take the place of what they are of, in the order in which it is read.
        aliases={
            Inputs._fields.index("pre_activation"): 0,
            len(inputs) + 1: 1,
        },
    )
    before = jnp.concatenate([inputs.hidden[None], hidden[:-1]])  # what entered each step
    dtype = options.operands
    by_kernel = jax.lax.dot_general(
        before.astype(dtype),
        by_term.astype(dtype),
        (((0, 2), (0, 2)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return (
        Inputs(
            by_kernel,
            by_pre,
            None,
            *by_params,
            by_first_cell,
            by_first_hidden,
            None,
            None,
        ),
    )


run.defvjp(_run_forward, _run_backward)


# ---- The layer's side, where arrays are [time, batch, features].


def gpu(
    kernel: Array,
    params: dict[str, Array],
    carry: Carry,
    pre_activation: Array,
    valid: Array | None,
    counted: dict[str, Array | None],
    given: dict[str, Statistics] | None,
    normalize: Sequence[str],
    epsilon: float,
    dtype: Any = None,
    units_of_block: int = 0,
) -> tuple[Carry, tuple[Array, dict[str, Moments]]]:
    """The recurrence of an LSTM or BN-LSTM, without gradients of `given`. See also `refusal`.

    Args:
      kernel: the recurrent kernel `[H, 4H]`.
      params: `recurrent_scale [4H]`, `cell_scale [H]` and `cell_bias [H]`, as far as there are any.
      carry: the initial `(c, h)`, each `[batch, H]`, with at most `LARGEST_BATCH` rows.
      pre_activation: the input term, normalised if it is to be, and the bias, `[T, batch, 4H]`.
      valid: which rows go on, boolean `[T, batch, 1]`; None for all.
      counted: which count in the statistics of a term, likewise.
      given: statistics of the terms at each step, `[T, F]`; the batch's own if None.
      normalize: the terms that are normalised.
      epsilon: added to variances.
      dtype: of the operands of recurrent products, float32 or bfloat16; float32 if None.
      units_of_block: see `Options`.

    Returns:
      The last carry, hidden states `[T, batch, H]`, and the batch's moments of terms that they
      normalised.

    Raises:
      RuntimeError: the kernel cannot be compiled.
    """
    steps, batch, gates = pre_activation.shape
    units = gates // 4
    load(platform())
    padding = padded(batch) - batch

    def to_kernel(x: Array) -> Array:
        x = jnp.swapaxes(x, -1, -2)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])

    def from_kernel(x: Array) -> Array:
        return jnp.swapaxes(x[..., :batch], -1, -2)

    def flag(value: int, rows: Array | None) -> Array:
        rows = jnp.ones((steps, batch, 1), bool) if rows is None else rows
        return jnp.where(rows[..., 0], value, 0).astype(jnp.uint8)

    def statistics(term: str, size: int) -> Array:
        if given is None or term not in normalize:
            return jnp.zeros((steps if given is not None else 0, 2, size), jnp.float32)
        return jnp.stack(given[term], 1)

    flags = flag(VALID, valid)
    flags |= flag(IN_RECURRENT, counted.get("recurrent"))
    flags |= flag(IN_CELL, counted.get("cell"))
    options = Options(
        "recurrent" in normalize,
        "cell" in normalize,
        given is not None,
        epsilon,
        jnp.dtype(dtype or jnp.float32).name,
        units_of_block,
    )
    hidden, cell, *found = run(
        options,
        Inputs(
            kernel,
            to_kernel(pre_activation),
            jnp.pad(flags, [(0, 0), (0, padding)]),
            params.get("recurrent_scale", jnp.ones(gates, jnp.float32)),
            params.get("cell_scale", jnp.ones(units, jnp.float32)),
            params.get("cell_bias", jnp.zeros(units, jnp.float32)),
            *map(to_kernel, carry),
            statistics("recurrent", gates),
            statistics("cell", units),
        ),
    )
    hidden = from_kernel(hidden)
    moments = {}
    for term, values in zip(("recurrent", "cell"), found, strict=True):
        if term in normalize and given is None:
            moments[term] = Moments(values[:, :1], values[:, 1:], None)
    return (from_kernel(cell), hidden[-1]), (hidden, moments)
