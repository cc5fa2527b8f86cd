"""Measures a device's rates of matrix products, copies, and steps of an almost empty scan.

These rates limit a recurrence. Products are of square matrices. A copy reads and writes an array
larger than any cache. A scan step does almost nothing: its time is XLA's cost of starting a step.
"""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnlstm_jax.recurrence.devices import default_device
from experiments.benchmarking import timing
from experiments.runtime import files, markdown

STEPS = 784  # of the scan
ROUNDS = 7


class Rate(NamedTuple):
    """A compiled program, and the amount of work in one run of it."""

    run: Callable[[], Any]
    amount: float
    unit: str


def compile_product(size: int, dtype: Any, precision: str) -> Rate:
    """The product of two square matrices."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    with jax.default_matmul_precision(precision):
        program = jax.jit(jnp.dot).lower(x, x).compile()
    return Rate(functools.partial(program, x, x), 2 * size**3 / 1e12, "TFLOP/s")


def compile_copy(length: int) -> Rate:
    """Reads and writes an array of float32."""
    x = jnp.zeros(length, jnp.float32)
    program = jax.jit(lambda x: x + 1).lower(x).compile()
    return Rate(functools.partial(program, x), 2 * x.nbytes / 1e9, "GB/s")


def compile_scan() -> Rate:
    """A scan with one small operation a step."""
    x = jnp.zeros((8, 8))
    scan = jax.jit(lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=STEPS)[0])
    return Rate(functools.partial(scan.lower(x).compile(), x), STEPS / 1e6, "million steps/s")


def run(small: bool, output: Path) -> None:
    """Measures on the default device; prints a table and writes the file."""
    device = default_device()
    size, length = (8192, 2**28) if device.platform == "gpu" else (2048, 2**26)
    if small:
        size, length = 256, 2**16
    makers = {"product, float32": lambda: compile_product(size, jnp.float32, "highest")}
    if device.platform == "gpu":
        makers["product, tf32"] = lambda: compile_product(size, jnp.float32, "tensorfloat32")
    makers["product, bfloat16"] = lambda: compile_product(size, jnp.bfloat16, "default")
    makers["copy"] = lambda: compile_copy(length)
    makers["scan"] = compile_scan
    measured: dict[str, dict[str, Any]] = {}
    record = timing.circumstances(device) | {"rates": measured}
    for name, make in makers.items():
        measured[name] = measure(make())
        files.write_json(output, record)
    print(f"On {device.device_kind}, JAX {jax.__version__}\n\n{table(measured)}")


def measure(rate: Rate) -> dict[str, Any]:
    """The amount of work per second, in each round."""

    def once() -> None:
        jax.block_until_ready(rate.run())

    once()
    seconds = timing.measure({"": once}, "", ROUNDS)[""]
    rounds = [rate.amount / each for each in seconds]
    return {"unit": rate.unit, "median": statistics.median(rounds), "rounds": rounds}


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Medians, and lowest to highest."""
    rows = [
        (name, *timing.spread(found["rounds"], ".4g"), found["unit"])
        for name, found in measured.items()
    ]
    return markdown.table(["measured", "median", "lowest to highest", "unit"], rows)
