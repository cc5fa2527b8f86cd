"""Native sources are compiled once; failures are reported and leave no library."""

import errno
import functools
import platform
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest

from bnlstm_jax.recurrence.native import build, common, cpu, cuda
from tests.python_process import finish, start

BUILD = """
    from bnlstm_jax.recurrence.native import build, cpu
    print(build.build(cpu.SOURCE, "cpu"))
"""


def fake_compiler(folder, compile):
    """A compiler that, given `-o PATH`, runs a shell command with the path as `$output`."""
    path = folder / "compiler"
    path.write_text(
        '#!/bin/sh\nfor word; do [ "$before" = -o ] && output="$word"; before="$word"; done\n'
        f'[ -z "$output" ] && exit\n{compile}\n'
    )
    path.chmod(0o755)
    return path


def test_concurrent_builds_produce_one_library(tmp_path):
    both = 'while [ $(wc -l < "$0.log") -lt 2 ]; do sleep 0.05; done'
    compile = f'echo "$output" >> "$0.log"; {both}; echo library > "$output"'
    compiler = fake_compiler(tmp_path, compile)
    environment = {"CXX": compiler, "PATH": "/bin:/usr/bin", "XDG_CACHE_HOME": tmp_path}
    processes = [start(BUILD, **environment) for _ in range(2)]
    (first, _), (second, _) = (finish(process) for process in processes)
    assert first == second
    assert [str(path) for path in (tmp_path / "bnlstm_jax").iterdir()] == [first]
    outputs = (tmp_path / "compiler.log").read_text().splitlines()
    assert len({first, *outputs}) == 3  # half-written libraries have names of their own


def test_killed_build_leaves_no_library(tmp_path):
    compiler = fake_compiler(tmp_path, 'echo half > "$output"; kill -KILL $PPID')
    environment = {"CXX": compiler, "PATH": "/bin:/usr/bin", "XDG_CACHE_HOME": tmp_path}
    process = start(BUILD, **environment)
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert not list((tmp_path / "bnlstm_jax").glob("*.so"))
    fake_compiler(tmp_path, 'echo whole > "$output"')
    path, _ = finish(start(BUILD, **environment))
    assert Path(path).read_text() == "whole\n"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "bnlstm_jax"


@pytest.mark.parametrize("source", [cpu.SOURCE, cuda.SOURCE])
def test_kernel_is_compiled_once(source, cache, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, 'echo called >> "$0.log"; echo library > "$output"')
    monkeypatch.setenv("CXX", str(compiler))
    made = build.build(source, "cpu")
    assert made == build.build(source, "cpu")
    assert (tmp_path / "compiler.log").read_text() == "called\n"
    assert list(cache.iterdir()) == [made]


def test_library_path_depends_on_compiler_flags_and_headers(cache, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, 'echo library > "$output"')
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "compiler", lambda *_: "one")
    folder = shutil.copytree(cpu.SOURCE.parent, tmp_path / "kernel")
    source = folder / cpu.SOURCE.name
    made = [build.build(source, "cpu")]
    monkeypatch.setattr(build, "compiler", lambda *_: "another")
    made.append(build.build(source, "cpu"))
    monkeypatch.setenv("CXX", f"{compiler} -g")
    made.append(build.build(source, "cpu"))
    for path in (folder / "vectors.h", source):
        path.write_text(path.read_text() + "// changed")
        made.append(build.build(source, "cpu"))
    assert len(set(made)) == 5


def test_compiler_errors_are_written_to_a_log(cache, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, "echo no such thing >&2; exit 1")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=r"^recurrence\.cc cannot be compiled, see .*\.log$"):
        build.build(cpu.SOURCE, "cpu")
    (log,) = cache.iterdir()
    assert log.read_text().endswith("\nno such thing\n")


def test_full_disk_is_reported_as_a_compilation_failure(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "build", full)
    with pytest.raises(RuntimeError, match=r"^source\.cc cannot be compiled: .*No space left"):
        common.load(tmp_path / "source.cc", "cpu", "Symbol", "target")


def test_unloadable_library_raises_without_recompilation(cache, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, 'echo called >> "$0.log"; echo no library > "$output"')
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(common, "_load", functools.cache(common._load.__wrapped__))
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"recurrence\.cc .* cannot be loaded: .*; if Python's"
        ):
            cpu.load()
    assert (tmp_path / "compiler.log").read_text() == "called\n"


def test_build_errors_keep_no_arrays_alive(cache, monkeypatch):
    monkeypatch.setenv("CXX", "nowhere/g++")
    monkeypatch.setattr(common, "_load", functools.cache(common._load.__wrapped__))

    def call():
        array = np.zeros(3)
        with pytest.raises(RuntimeError, match="nowhere/g"):
            cpu.load()
        return weakref.ref(array)

    for _ in range(2):
        assert call()() is None


def test_missing_compiler_raises(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "nowhere/g++")
    with pytest.raises(RuntimeError, match=r"^the compiler nowhere/g\+\+ cannot be run: No such"):
        build.build(cpu.SOURCE, "cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"install g\+\+, or use implementation='xla'"):
        build.build(cpu.SOURCE, "cpu")


def test_nvcc_is_found_in_python_packages(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.sys, "path", [str(tmp_path)])
    with pytest.raises(RuntimeError, match=r"nvcc, which is neither .*implementation='xla'"):
        build.find_nvcc()
    packaged = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    packaged.parent.mkdir(parents=True)
    packaged.touch()
    assert build.find_nvcc() == str(packaged)


def test_compiler_identity_includes_its_version():
    assert "__VERSION__" in build.compiler([], "cpu")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux", reason="needs x86 Linux"
)
def test_library_uses_the_widest_vectors_of_the_processor():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    names = {"avx512f": "AVX-512", "avx2": "AVX2"}
    expected = next((name for flag, name in names.items() if flag in flags), "128-bit vectors")
    assert cpu.instruction_set() == expected


def test_cache_folder_is_temporary_without_a_home_directory(monkeypatch, caplog):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", home)
    assert build.library_path("library.so").parent.is_dir()
    assert "libraries are not cached: Could not determine" in caplog.text


def test_library_in_a_read_only_cache_is_used(cache, monkeypatch, tmp_path, caplog):
    compiler = fake_compiler(tmp_path, 'echo library > "$output"')
    monkeypatch.setenv("CXX", str(compiler))
    made = build.build(cpu.SOURCE, "cpu")

    def refused(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(build.tempfile, "TemporaryFile", refused)
    assert build.build(cpu.SOURCE, "cpu") == made and not caplog.text
    made.unlink()
    assert build.build(cpu.SOURCE, "cpu").parent != cache
    assert "libraries are not cached: [Errno 30] Read-only" in caplog.text


def test_unbalanced_quote_in_cxx_raises(monkeypatch):
    monkeypatch.setenv("CXX", 'g++ "-O3')
    with pytest.raises(RuntimeError, match=r"CXX is .*: No closing quotation"):
        build.cpp_compiler()


def test_failed_build_is_not_repeated(monkeypatch, tmp_path):
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        raise RuntimeError("it cannot be compiled")

    monkeypatch.setattr(common, "build", fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it cannot be compiled"):
            common.load(tmp_path / "source.cc", "cpu", "Symbol", "target")
    assert len(calls) == 1
