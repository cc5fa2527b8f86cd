"""Native sources are compiled once; failures are reported and leave no library."""

import functools
from pathlib import Path

import pytest

from bnlstm_jax.recurrence.native import build, common, cpu, cuda
from tests.python_process import finish, start

BUILD = """
    from bnlstm_jax.recurrence.native import build, cpu
    print(build.build(cpu.SOURCE, "cpu"))
"""


def fake_compiler(folder, compile):
    """A compiler that runs a shell command, with the path given by `-o` as `$output`."""
    path = folder / "compiler"
    path.write_text(
        '#!/bin/sh\nfor word; do [ "$before" = -o ] && output="$word"; before="$word"; done\n'
        f'[ -z "$output" ] && exit\n{compile}\n'
    )
    path.chmod(0o755)
    return path


def test_two_processes_may_compile_at_once(tmp_path):
    compiler = fake_compiler(tmp_path, 'echo begun >> "$0.log"; sleep 3; echo library > "$output"')
    environment = {"CXX": compiler, "PATH": "/bin:/usr/bin", "XDG_CACHE_HOME": tmp_path}
    processes = [start(BUILD, **environment) for _ in range(2)]
    (first, _), (second, _) = (finish(process) for process in processes)
    assert first == second
    assert [str(path) for path in (tmp_path / "bnlstm_jax").iterdir()] == [first]


def test_a_process_killed_while_it_compiles_leaves_no_library(tmp_path):
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
def test_is_compiled_once(source, cache, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, 'echo called >> "$0.log"; echo library > "$output"')
    monkeypatch.setenv("CXX", str(compiler))
    made = build.build(source, "cpu")
    assert made == build.build(source, "cpu")
    assert (tmp_path / "compiler.log").read_text() == "called\n"
    assert list(cache.iterdir()) == [made]


def test_a_library_is_of_one_source_compiler_and_processor(cache, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, 'echo library > "$output"')
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "compiler", lambda *_: "one")
    made = [build.build(cpu.SOURCE, "cpu")]
    monkeypatch.setattr(build, "compiler", lambda *_: "another")
    made.append(build.build(cpu.SOURCE, "cpu"))
    monkeypatch.setenv("CXX", f"{compiler} -g")
    made.append(build.build(cpu.SOURCE, "cpu"))
    header = build.headers(cpu.SOURCE)[0]
    monkeypatch.setattr(build, "headers", lambda source: [header])
    made.append(build.build(cpu.SOURCE, "cpu"))
    assert len(set(made)) == 4


def test_all_headers_of_a_source_are_found():
    folder = cpu.SOURCE.parent
    assert build.headers(cpu.SOURCE) == sorted(folder.glob("*.h"))
    assert build.headers(cuda.SOURCE) == [cuda.SOURCE.parent / "emulation.h"]


def test_what_the_compiler_says_is_kept_in_a_log(cache, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, "echo no such thing >&2; exit 1")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=r"^recurrence\.cc cannot be compiled, see .*\.log$"):
        build.build(cpu.SOURCE, "cpu")
    (log,) = cache.iterdir()
    assert log.read_text().endswith("\nno such thing\n")


def test_a_full_disk_is_no_problem_of_loading(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "build", full)
    with pytest.raises(RuntimeError, match=r"^source\.cc cannot be compiled: .*No space left"):
        common.load(tmp_path / "source.cc", "cpu", "Symbol", "target")


def test_a_library_that_cannot_be_loaded_is_an_error_of_one_line(cache, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, 'echo called >> "$0.log"; echo no library > "$output"')
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(common, "_load", functools.cache(common._load.__wrapped__))
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"recurrence\.cc .* cannot be loaded: .*; where Python"
        ):
            cpu.load()
    assert (tmp_path / "compiler.log").read_text() == "called\n"


def test_a_compiler_that_is_not_there_is_named(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "nowhere/g++")
    with pytest.raises(RuntimeError, match=r"^the compiler nowhere/g\+\+ cannot be run: No such"):
        build.build(cpu.SOURCE, "cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"install g\+\+, or write implementation='xla'"):
        build.build(cpu.SOURCE, "cpu")


def test_nvcc_is_found_among_packages(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.sys, "path", [str(tmp_path)])
    with pytest.raises(RuntimeError, match=r"nvcc is neither .*implementation='xla'"):
        build.find_nvcc()
    packaged = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    packaged.parent.mkdir(parents=True)
    packaged.touch()
    assert build.find_nvcc() == str(packaged)


def test_the_processor_is_told_by_the_compiler():
    assert "__VERSION__" in build.compiler([], "cpu")
    assert cpu.instruction_set() in ("AVX-512", "AVX2", "NEON", "128-bit vectors")


def test_a_user_without_a_home_has_libraries_for_one_process(monkeypatch, caplog):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", home)
    assert build.cache_folder().is_dir()
    assert "libraries are not kept: Could not determine" in caplog.text


def test_an_unbalanced_quotation_in_the_name_of_the_compiler_is_told(monkeypatch):
    monkeypatch.setenv("CXX", 'g++ "-O3')
    with pytest.raises(RuntimeError, match=r"CXX is .*: No closing quotation"):
        build.cpp_compiler()


def test_a_compiler_that_fails_runs_once(monkeypatch, tmp_path):
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        raise RuntimeError("it cannot be compiled")

    monkeypatch.setattr(common, "build", fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it cannot be compiled"):
            common.load(tmp_path / "source.cc", "cpu", "Symbol", "target")
    assert len(calls) == 1
