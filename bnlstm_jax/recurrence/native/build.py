"""Compiles native sources at first use: for NVIDIA GPUs by CUDA's nvcc, for CPUs by a C++ compiler.

Libraries are kept in `bnlstm_jax` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`).
"""

import hashlib
import logging
import os
import shutil
import site
import subprocess
import tempfile
from pathlib import Path

import jax

from bnlstm_jax.recurrence.devices import default_device


def build(source: Path, platform: str) -> Path:
    """The shared library of a source file, for a platform of JAX: `gpu` or `cpu`.

    Raises:
      RuntimeError: there is no compiler, or it failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bnlstm_jax"
    cache.mkdir(parents=True, exist_ok=True)
    command = compile_command(source, platform, Path("OUTPUT"))
    contents = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    version = hashlib.sha256(repr((command, jax.__version__, contents)).encode()).hexdigest()[:16]
    target = cache / f"{source.stem}_{platform}_{version}.so"
    if not target.exists():
        logging.getLogger(__name__).info("compiling %s for %s, once", source.name, platform)
        # In a folder of its own until it is complete: other processes may compile it too.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / target.name
            command = compile_command(source, platform, made)
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                missing = "nv/target" in result.stderr  # in a package that JAX does not need
                hint = "; install the package nvidia-cuda-cccl" if missing else ""
                raise RuntimeError(f"{source} cannot be compiled{hint}:\n{result.stderr[-2000:]}")
            made.replace(target)
    return target


def compile_command(source: Path, platform: str, target: Path) -> list[str]:
    """The command that compiles a source file for the default device of a platform.

    Raises:
      RuntimeError: there is no compiler.
    """
    if platform == "gpu":
        capability = default_device().compute_capability
        return nvcc_command(source, capability.replace(".", ""), target)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError(
            f"{source.name} is compiled at first use, and there is no C++ compiler; install g++, "
            "or write implementation='xla'"
        )
    return [compiler, "-O2", "-fPIC", *_common(target), "-x", "c++", str(source)]


def nvcc_command(source: Path, architecture: str, target: Path) -> list[str]:
    """The command for GPUs of an architecture, such as `90` for Hopper.

    Raises:
      RuntimeError: there is no nvcc.
    """
    nvcc = find_nvcc()
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    # Python's packages have the runtime where their nvcc does not look for it.
    libraries = Path(nvcc).resolve().parents[1] / "lib"
    options = ["-O3", code, "-Xcompiler=-fPIC", f"-L{libraries}"]
    return [nvcc, *options, *_common(target), str(source)]


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
        "nvidia-cuda-nvcc, or write implementation='xla'"
    )


def _common(target: Path) -> list[str]:
    """Options of all compilers. Warnings would be those of XLA's headers."""
    return ["-std=c++17", "-w", "-shared", "-isystem", jax.ffi.include_dir(), "-o", str(target)]
