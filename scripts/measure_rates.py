"""Measures what a device can do: matrix products, copies, and the start of a small program.

    python -m scripts.measure_rates

These are the limits that a recurrence runs into. Products are of square matrices. A copy reads and
writes an array that no cache holds. A step of a scan does next to nothing: its time is what XLA
takes to start a step.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from bnlstm_jax.recurrence.devices import default_device
from experiments.benchmarking import timing
from experiments.runtime import cli, files, markdown, paths

STEPS = 784  # of the scan


class Rate(NamedTuple):
    """What is measured: a program, and how much of its unit a call is."""

    run: Callable[[], Any]
    amount: float
    unit: str


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_bool("small", False, "Small arrays, for a quick look.")
    flags.DEFINE_integer("rounds", 7, "Measurements of each.", lower_bound=1)
    paths.DEFINE_path("output", "rates.json", "File for the results.")


def product(size: int, dtype: Any, precision: str) -> Rate:
    """The product of two square matrices."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    with jax.default_matmul_precision(precision):
        program = jax.jit(jnp.dot).lower(x, x).compile()
    return Rate(lambda: program(x, x), 2 * size**3 / 1e12, "TFLOP/s")


def rates(device: jax.Device, small: bool) -> dict[str, Rate]:
    """All that is measured on a device, by name."""
    size, length = (8192, 2**28) if device.platform == "gpu" else (2048, 2**26)
    if small:
        size, length = 256, 2**16
    array = jnp.zeros(length, jnp.float32)
    copy = jax.jit(lambda x: x + 1)

    def scan(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=STEPS)[0]

    scan, x = jax.jit(scan), jnp.zeros((8, 8))
    found = {"product, float32": product(size, jnp.float32, "highest")}
    if device.platform == "gpu":
        found["product, tf32"] = product(size, jnp.float32, "tensorfloat32")
    found["product, bfloat16"] = product(size, jnp.bfloat16, "default")
    found["copy"] = Rate(lambda: copy(array), 2 * array.nbytes / 1e9, "GB/s")
    found["scan"] = Rate(lambda: scan(x), STEPS / 1e6, "million steps/s")
    return found


def measure(rate: Rate, rounds: int) -> list[float]:
    """Amounts a second, in each round."""
    jax.block_until_ready(rate.run())  # compiles
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(rate.run())
        found.append(rate.amount / (time.perf_counter() - start))
    return found


def table(measured: dict[str, dict[str, Any]]) -> str:
    """The medians, and the lowest and highest."""
    rows = []
    for name, found in measured.items():
        low, high = min(found["rounds"]), max(found["rounds"])
        spread = f"{low:.4g} to {high:.4g}"
        rows.append((name, f"{found['median']:.4g}", spread, found["unit"]))
    return markdown.table(["measured", "median", "lowest to highest", "unit"], rows)


def main(_: list[str]) -> None:
    """Prints a table, and writes the file."""
    given = flags.FLAGS
    output = Path(given.output)
    timing.check_output(output)
    device = default_device()
    measured: dict[str, dict[str, Any]] = {}
    record = timing.circumstances(device) | {"rates": measured}
    for name, rate in rates(device, given.small).items():
        rounds = measure(rate, given.rounds)
        measured[name] = {"unit": rate.unit, "median": statistics.median(rounds), "rounds": rounds}
        files.write_json(output, record)
    print(f"On {device.device_kind}, JAX {jax.__version__}\n\n{table(measured)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
