"""Shared by the native kernels: loading, supported problems, flags."""

import ctypes
import functools
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from bnlstm_jax.recurrence.native.build import build
from bnlstm_jax.recurrence.problem import Problem

_LOADING = threading.Lock()  # threads compile a library only once
# Flags of a sequence at a time step: it is valid; it counts in the moments of a term.
VALID, COUNTS = 1, {"recurrent": 2, "cell": 4, "input": 8}


def load(source: Path, platform: str, symbol: str, target: str) -> ctypes.CDLL:
    """Loads the library of a source file, and registers its two calls with XLA for a platform.

    Its `{symbol}Forward` and `{symbol}Backward` become `{target}_forward` and `{target}_backward`.

    Raises:
      RuntimeError: it cannot be compiled or loaded. Later calls raise the same error, without
        trying again.
    """
    with _LOADING:
        library = _load(source, platform, symbol, target)
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@functools.cache
def _load(source: Path, platform: str, symbol: str, target: str) -> ctypes.CDLL | str:
    # Returns the text of an error: a cached exception would keep the frames that raised it.
    try:
        path = build(source, platform)
    except RuntimeError as error:
        return str(error)
    except OSError as error:
        return f"{source.name} cannot be compiled: {error}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        hint = ""
        if platform == "cpu":
            hint = (
                "; if Python's libstdc++ is older than the compiler's, set "
                "CXX='g++ -static-libstdc++ -static-libgcc'"
            )
        return f"{source.name} was compiled but cannot be loaded: {error}{hint}"
    name = "CUDA" if platform == "gpu" else platform
    for call in ("Forward", "Backward"):
        handler = jax.ffi.pycapsule(getattr(library, f"{symbol}{call}"))
        jax.ffi.register_ffi_target(f"{target}_{call.lower()}", handler, platform=name)
    return library


def why_unsupported(problem: Problem) -> str | None:
    """Why no native kernel supports a problem; None if one may."""
    norm = problem.norm
    if norm.pools and problem.statistics is None:
        return "does not support axis_name"
    if norm.terms and norm.kind == "layer":
        return "does not support layer normalisation"
    return None


def flags(problem: Problem) -> Array:
    """The flags of all sequences and time steps, bytes `[T, B]`."""
    steps, batch = problem.source.shape[:2]
    every = jnp.ones((steps, batch), bool)
    valid = every if problem.valid is None else problem.valid[..., 0]
    found = jnp.where(valid, VALID, 0)
    for term, flag in COUNTS.items():
        found |= jnp.where(valid if term in problem.norm.masked else every, flag, 0)
    return found.astype(jnp.uint8)
