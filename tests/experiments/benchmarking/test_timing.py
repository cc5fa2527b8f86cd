import pytest

from experiments.benchmarking import programs, timing
from experiments.runtime.errors import UserError


def test_programs_take_turns():
    ran = []
    made = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = timing.measure(made, "", 3)
    assert "".join(ran) == "ab" * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_spread_is_median_and_extremes():
    assert timing.spread([4.0, 1.0, 2.5]) == ("2.5", "1.0 to 4.0")


def test_library_digest_depends_only_on_source_files(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/cell.cu").write_text("a")
    first = timing.library_digest(tmp_path)
    (tmp_path / "kernels/cell.pyc").write_bytes(b"compiled")
    assert timing.library_digest(tmp_path) == first
    (tmp_path / "kernels/cell.cu").write_text("b")
    changed = timing.library_digest(tmp_path)
    (tmp_path / "kernels/cell.cu").rename(tmp_path / "kernels/layer.cu")
    assert len({first, changed, timing.library_digest(tmp_path)}) == 3


def test_missing_device_raises(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(timing.memory, "keep_freed", lambda: None)
    with pytest.raises(UserError, match="--device=tpu"):
        timing.use_device("tpu")


def test_operations_count_matrix_products():
    """Two per kernel element, example and time step; embedded inputs have a product too."""
    recurrent = 2 * 784 * 100 * 100 * 400
    assert programs.operations(programs.SIZES["pmnist"], is_update=False) == recurrent
    assert programs.operations(programs.SIZES["pmnist"], is_update=True) == 3 * recurrent
    both_directions = 2 * 2 * 300 * 64 * (240 + 240) * 960
    assert programs.operations(programs.SIZES["reader"], is_update=False) == both_directions


def test_failing_candidate_is_skipped_except_the_default(capsys):
    def fail():
        raise RuntimeError("out of memory")

    program = timing.Program(lambda: None)
    assert programs.compile_all({"a": fail, "b": lambda: program}) == {"b": program}
    assert "a: out of memory" in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        programs.compile_all({programs.DEFAULT: fail})
