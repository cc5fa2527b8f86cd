"""Measures the candidates for each size, dtype and pass; prints tables and writes one file."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bnlstm_jax.recurrence.devices import default_device
from bnlstm_jax.recurrence.native import cpu
from experiments.benchmarking import programs, timing
from experiments.benchmarking.programs import DEFAULT, PRODUCTS, Size
from experiments.benchmarking.timing import Program
from experiments.runtime import files, markdown


def peak_of(device: jax.Device) -> float | None:
    """Peak float32 operations a second of a CPU; None for other devices, or without a compiler."""
    if device.platform != "cpu":
        return None
    try:
        return cpu.peak()
    except (RuntimeError, OSError):
        return None


def measure(made: dict[str, Program], title: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Measures each candidate; returns its entry for the file."""
    seconds = timing.measure({name: p.run for name, p in made.items()}, title, rounds)
    return {
        name: {
            "seconds": seconds[name],
            "median": statistics.median(seconds[name]),
            "memory_bytes": program.memory,
            "compile_seconds": program.compile_seconds,
        }
        for name, program in made.items()
    }


def table(measured: dict[str, dict[str, Any]], steps: int, least: float | None) -> str:
    """The table of one pass, which would take `least` seconds at the processor's peak, if known."""
    own, floor = measured[DEFAULT]["median"], measured[PRODUCTS]["median"]
    rows = []
    for name, found in measured.items():
        median, size, compiling = (
            found[key] for key in ("median", "memory_bytes", "compile_seconds")
        )
        rows.append(
            (
                name,
                *timing.spread([1e3 * seconds for seconds in found["seconds"]]),
                f"{1e6 * median / steps:.1f}",
                f"{median / own:.2f}",
                f"{floor / median:.0%}",
                "-" if least is None else f"{least / median:.0%}",
                "-" if size is None else f"{size / 1e6:.1f}",
                "-" if compiling is None else f"{compiling:.1f}",
            )
        )
    header = ["candidate", "ms per pass", "spread", "us per time step", f"to {DEFAULT}"]
    header += ["products' share", "of the peak", "memory MB", "compile s"]
    return markdown.table(header, rows)


def run(
    sizes: dict[str, Size],
    dtypes: Sequence[str],
    passes: Sequence[str],
    implementations: Mapping[str, Sequence[str]],
    rounds: int,
    output: Path,
    recorded: dict[str, Any],
) -> None:
    """Measures on the default device; prints a table for each pass and rewrites the file.

    Args:
      sizes: layers to measure, by name.
      dtypes, passes: names in `programs.DTYPES` and `programs.PASSES`.
      implementations: of the recurrence, including `xla`, by size.
      rounds: measurements of each candidate.
      output: JSON file of all results.
      recorded: the command's flags, for the file.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # measures compilation
    device = default_device()
    if programs.pytorch_device() is None:
        print("PyTorch is not installed for this device: its layers are left out.\n")
    peak = peak_of(device)
    if peak:
        instructions = cpu.instruction_set()
        print(f"Peak in float32, {instructions}, of all threads: {peak / 1e9:.0f} GFLOP/s.\n")
    record = timing.circumstances(device) | {"flags": recorded, "peak_flops": peak, "results": []}
    record["sizes"] = {name: size._asdict() for name, size in sizes.items()}
    for kind, name, dtype in itertools.product(passes, sizes, dtypes):
        size, title, is_update = sizes[name], f"{name}, {dtype}, {kind}", kind == "update"
        candidates = programs.candidates(size, dtype, is_update, implementations[name])
        made = programs.compile_all(candidates)
        measured = measure(made, f"measuring {title}", rounds)
        del made  # frees its arrays
        least = None
        if peak and dtype == "float32":
            least = programs.operations(size, is_update) / peak
        print(
            f"{title}: {size.features} units, batch {size.batch}, {size.steps} steps, on "
            f"{device.device_kind}; {rounds} rounds\n\n{table(measured, size.steps, least)}\n",
            flush=True,
        )
        result = {"size": name, "dtype": dtype, "pass": kind, "candidates": measured}
        record["results"].append(result)
        files.write_json(output, record)
    print(f"All results: {output}")
