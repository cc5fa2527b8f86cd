"""The implementations of the recurrence, which are equal up to rounding.

    xla         a scan with a hand-written backward pass and few residuals
    reference   a plain scan, differentiated by JAX
    tpu         one kernel for all steps, for TPUs
    gpu         one kernel for all steps, for NVIDIA GPUs
    cpu         one kernel for all steps, for CPUs

A `Problem` holds the inputs of a recurrence, a `Result` its outputs. An implementation is a
function from a problem to its result, and a function that returns why it cannot run a problem. To
add an implementation, write both functions, and add them to `IMPLEMENTATIONS` with the platform.
`xla`, `reference` and `tpu` run `problem.step`; `gpu` and `cpu` do not.

`auto` selects the platform's kernel if it supports the layer and is validated in `VALIDATED_UNITS`
for the kind of device and the layer's hidden units; else it selects `xla`. With several devices it
selects `xla` too: a kernel runs the whole batch on one device, and XLA can shard it.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bnlstm_jax.normalization import Statistics, on_any_mesh
from bnlstm_jax.recurrence import pallas_tpu, scan
from bnlstm_jax.recurrence.devices import default_device, runs_here
from bnlstm_jax.recurrence.native import cpu, cuda
from bnlstm_jax.recurrence.problem import Problem, Result


class Implementation(NamedTuple):
    """An implementation of the recurrence.

    Attributes:
      run: runs a problem that it supports.
      why_unsupported: returns why it cannot run a problem, or None if it can. The arrays may be
        `jax.ShapeDtypeStruct`s. Raises a RuntimeError if a kernel cannot be compiled, or a device
        fails.
      platform: the JAX platform that it needs; None for any.
      max_batch: the largest batch that it runs, None for no limit; `xla` runs larger ones.
    """

    run: Callable[[Problem], Result]
    why_unsupported: Callable[[Problem], str | None] = lambda _: None
    platform: str | None = None
    max_batch: int | None = None


IMPLEMENTATIONS = {
    "xla": Implementation(scan.xla),
    "reference": Implementation(scan.reference),
    "tpu": Implementation(pallas_tpu.run, pallas_tpu.why_unsupported, "tpu"),
    "gpu": Implementation(cuda.run, cuda.why_unsupported, "gpu", cuda.LARGEST_BATCH),
    "cpu": Implementation(cpu.run, cpu.why_unsupported, "cpu"),
}
NAMES = ("auto", *IMPLEMENTATIONS)  # values of a layer's `implementation`
# The largest number of hidden units for which a kernel is validated, by `jax.Device.device_kind`.
VALIDATED_UNITS: dict[str, float] = {"NVIDIA H100 80GB HBM3": 1000, "cpu": math.inf}


def available() -> list[str]:
    """The implementations that run on the default device."""
    return [name for name, each in IMPLEMENTATIONS.items() if runs_here(each.platform)]


def why_unsupported(name: str, problem: Problem) -> str | None:
    """Why an implementation cannot run a problem here; None if it can.

    Raises:
      RuntimeError: its kernel cannot be compiled.
    """
    if name == "auto":
        return None
    platform = IMPLEMENTATIONS[name].platform
    if not runs_here(platform):
        here = default_device().platform
        return f"needs a device of platform {platform!r}, got {here!r}"
    return IMPLEMENTATIONS[name].why_unsupported(problem)


def choose(name: str, problem: Problem) -> str:
    """The name of the implementation that runs a problem; logs why if it differs from `name`.

    Raises:
      ValueError: there is no such implementation, or it does not support the problem.
      RuntimeError: its kernel cannot be compiled.
    """
    if name not in NAMES:
        raise ValueError(f"implementation: expected one of {NAMES}, got {name!r}")
    chosen, reason, level = name, "", logging.INFO
    if name == "auto":
        chosen, reason, level = _validated(problem)
    elif unsupported := why_unsupported(name, problem):
        raise ValueError(f"implementation={name!r} {unsupported}; use implementation='xla'")
    batch, most = problem.carry[1].shape[0], IMPLEMENTATIONS[chosen].max_batch
    if most is not None and batch > most:
        level = logging.INFO if name == "auto" else logging.WARNING
        chosen, reason = "xla", f"{chosen!r} supports up to {most} sequences, got {batch}"
    if chosen != name:
        log_choice(name, chosen, reason, level)
    return chosen


def run(name: str, problem: Problem) -> Result:
    """Runs a problem by a chosen implementation; without steps or sequences, nothing is run."""
    (steps, batch), units = problem.source.shape[:2], problem.recurrent_kernel.shape[0]
    if steps and batch:
        return on_any_mesh(IMPLEMENTATIONS[name].run, _specs(problem), problem)
    moments, norm = {}, problem.norm
    for term in norm.batch_terms if problem.statistics is None else ():
        (features,) = problem.params[f"{term}_scale"].shape
        whole = norm.whole_input and term == "input"
        zeros = jnp.zeros((features,) if whole else (steps, features), problem.carry[0].dtype)
        moments[term] = Statistics(zeros, zeros)
    hidden = jnp.zeros((steps, batch, units), problem.carry[1].dtype)
    return Result(problem.carry, hidden, moments)


def _specs(problem: Problem) -> Any:
    """The sharding of a result on an explicit mesh: its batch axis is sharded like the inputs'."""
    rows, spec = jax.typeof(problem.source).sharding.spec[1], PartitionSpec
    fields: dict[str, Any] = {"carry": spec(rows), "hidden": spec(None, rows), "moments": spec()}
    return Result(**fields)


def _validated(problem: Problem) -> tuple[str, str, int]:
    """What `auto` selects for a problem, the reason, and the log level."""
    device, units = default_device(), problem.recurrent_kernel.shape[0]
    kernels = [name for name, each in IMPLEMENTATIONS.items() if each.platform == device.platform]
    validated = VALIDATED_UNITS.get(device.device_kind, 0)
    if not kernels:
        return "xla", f"there is no kernel for {device.device_kind}", logging.INFO
    if (devices := jax.device_count()) > 1:
        return "xla", f"kernels support one device, got {devices}", logging.INFO
    if validated == 0:
        return "xla", f"the kernel is not validated on {device.device_kind}", logging.INFO
    if units > validated:
        where = f"up to {validated} units on {device.device_kind}"
        return "xla", f"the kernel is validated {where}, got {units}", logging.INFO
    try:
        reason = IMPLEMENTATIONS[kernels[0]].why_unsupported(problem)
    except (RuntimeError, OSError) as error:  # from a compiler
        return "xla", str(error), logging.WARNING
    if reason is not None:
        return "xla", f"the kernel {reason}", logging.INFO
    return kernels[0], f"it is validated on {device.device_kind}", logging.INFO


@functools.cache
def log_choice(name: str, chosen: str, reason: str, level: int) -> None:
    """Logs which implementation was chosen; once, even if a layer is traced several times."""
    logging.getLogger(__name__).log(level, "implementation %r uses %r: %s", name, chosen, reason)
