"""Compiles native sources at first use: for NVIDIA GPUs by CUDA's nvcc, for CPUs by a C++ compiler.

Libraries are kept in `bnlstm_jax` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`). A
library's name has a hash of its sources, command, compiler, C library, JAX version and processor:
different machines can share a cache. A compiler is therefore needed at every start.
"""

import functools
import hashlib
import logging
import os
import platform as system
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from bnlstm_jax.recurrence.devices import default_device

# The option of C++ compilers that enables all instructions of this processor.
NATIVE = "-mcpu=native" if system.machine() in ("aarch64", "arm64") else "-march=native"


def build(source: Path, platform: str) -> Path:
    """Compiles a source file for JAX's platform `gpu` or `cpu` if needed; returns the library.

    It is compiled again if the compiler, its options, the source or a header beside it change.

    Raises:
      RuntimeError: there is no compiler, or it failed.
    """
    command = compile_command(source, platform)
    headers = sorted(source.parent.glob("*.h"))
    contents = [path.read_bytes() for path in (source, *headers)]
    key = command, compiler(command, platform), system.libc_ver(), jax.__version__, contents
    version = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    target = library_path(f"{source.stem}_{platform}_{version}.so")
    if target.exists():
        return target
    logging.getLogger(__name__).info("compiling %s for %s, once", source.name, platform)
    # Written to a temporary folder, then moved: other processes may compile it at the same time.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        result = run([*command, "-o", str(made)])
        if result.returncode:
            log = target.with_suffix(".log")
            log.write_text(f"{shlex.join(result.args)}\n{result.stderr}")
            missing = "nv/target" in result.stderr  # a header of a package that JAX does not need
            hint = "; install the package nvidia-cuda-cccl" if missing else ""
            raise RuntimeError(f"{source.name} cannot be compiled, see {log}{hint}")
        made.replace(target)
    return target


def library_path(name: str) -> Path:
    """The path of a library in the user's cache folder.

    If the library is not there and the folder is not writable, it is in a temporary folder.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(home) / "bnlstm_jax" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        logging.getLogger(__name__).warning(
            "compiled libraries are not cached: %s; set XDG_CACHE_HOME to a writable folder", error
        )
        return Path(_temporary_folder().name) / name
    return path


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="bnlstm_jax_")  # removed when the process ends


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Runs a compiler.

    Raises:
      RuntimeError: it cannot be run.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"the compiler {command[0]} cannot be run: {error.strerror}") from error


def compile_command(source: Path, platform: str) -> list[str]:
    """The command that compiles a source file for the default device, without `-o`.

    Raises:
      RuntimeError: there is no compiler.
    """
    if platform == "gpu":
        capability = default_device().compute_capability
        return nvcc_command(source, capability.replace(".", ""))
    speed = ["-O3", NATIVE, "-fno-math-errno", "-fno-trapping-math"]
    return [*cpp_compiler(), *speed, "-fPIC", "-pthread", *_common(), "-x", "c++", str(source)]


def cpp_compiler() -> list[str]:
    """The C++ compiler: `CXX` with its options, g++ or clang++.

    Raises:
      RuntimeError: there is none.
    """
    given = os.environ.get("CXX", "")
    try:
        if command := shlex.split(given):
            return command
    except ValueError as error:
        raise RuntimeError(f"the environment variable CXX is {given!r}: {error}") from error
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise RuntimeError(
            "implementations 'cpu' and 'gpu' need a C++ compiler, and neither g++ nor clang++ is "
            "on the PATH; install g++, or use implementation='xla'"
        )
    return [found]


def compiler(command: list[str], platform: str) -> str:
    """A text that identifies the compiler of a command, and this processor."""
    if platform == "gpu":
        return system.machine() + run([command[0], "--version"]).stdout
    # The predefined macros depend on both.
    return run([*cpp_compiler(), NATIVE, "-dM", "-E", "-x", "c++", os.devnull]).stdout


def nvcc_command(source: Path, architecture: str) -> list[str]:
    """The command for GPUs of an architecture, such as `90` for Hopper.

    Raises:
      RuntimeError: there is no nvcc.
    """
    nvcc = find_nvcc()
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    # In Python's packages, nvcc does not find the CUDA runtime by itself.
    libraries = Path(nvcc).resolve().parents[1] / "lib"
    options = ["-O3", code, "-Xcompiler=-fPIC", f"-L{libraries}"]
    return [nvcc, *options, *_common(), str(source)]


def find_nvcc() -> str:
    """Finds nvcc in `CUDA_HOME`, on the PATH, or in the packages that `jax[cuda13]` installs.

    Raises:
      RuntimeError: there is none.
    """
    places = [Path(folder) / "nvidia" for folder in sys.path]
    places = [found for place in places for found in sorted(place.glob("cu*/bin/nvcc"))]
    if found := shutil.which("nvcc"):
        places.insert(0, Path(found))
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, Path(home) / "bin" / "nvcc")
    for place in places:
        if place.exists():
            return str(place)
    raise RuntimeError(
        "implementation 'gpu' needs CUDA's nvcc, which is neither in CUDA_HOME nor on the PATH nor "
        "in Python's packages; install the CUDA toolkit or the package nvidia-cuda-nvcc, or use "
        "implementation='xla'"
    )


def _common() -> list[str]:
    """Options of all compilers. `-w` hides warnings of XLA's headers."""
    return ["-std=c++17", "-w", "-shared", "-isystem", jax.ffi.include_dir()]
