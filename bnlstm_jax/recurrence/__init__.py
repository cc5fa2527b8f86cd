"""One recurrence, several implementations, equal but for rounding.

    xla         a scan with a backward pass of few residuals
    reference   a plain scan, differentiated by JAX
    tpu         one kernel for all steps, for TPUs
    gpu         one kernel for all steps, for NVIDIA GPUs
    cpu         one kernel for all steps, for CPUs

A `Problem` says what a recurrence is given, a `Result` what it gives back. An implementation is a
function from one to the other, and one that says why it cannot run a problem. To add one, write
both, and name them in `IMPLEMENTATIONS` with the platform. All but `gpu` and `cpu` are made of
`problem.step`.

`auto` is the platform's kernel if the kind of device is in `VALIDATED_UNITS` and the layer has at
most that many units; else `xla`. It is `xla` too where there are several devices: a kernel runs all
of a batch on one, and XLA spreads it over them.
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
    """A way to run a recurrence.

    Attributes:
      run: runs a problem that it supports.
      why_unsupported: why it cannot run a problem, whose arrays may be `jax.ShapeDtypeStruct`s;
        None if it can. Raises RuntimeError if a kernel cannot be compiled, or a device fails.
      platform: the platform of JAX that it is for; None for all.
      max_batch: the largest batch that it runs, or None; `xla` runs larger ones.
    """

    run: Callable[[Problem], Result]
    why_unsupported: Callable[[Problem], str | None] = scan.why_unsupported
    platform: str | None = None
    max_batch: int | None = None


IMPLEMENTATIONS = {
    "xla": Implementation(scan.xla),
    "reference": Implementation(scan.reference),
    "tpu": Implementation(pallas_tpu.run, pallas_tpu.why_unsupported, "tpu"),
    "gpu": Implementation(cuda.run, cuda.why_unsupported, "gpu", cuda.LARGEST_BATCH),
    "cpu": Implementation(cpu.run, cpu.why_unsupported, "cpu"),
}
NAMES = ("auto", *IMPLEMENTATIONS)  # what users may name
# Hidden units up to which a kernel is validated, by kind of device as JAX names it.
VALIDATED_UNITS: dict[str, float] = {"NVIDIA H100 80GB HBM3": 1000, "cpu": math.inf}


def available() -> list[str]:
    """The implementations for the default device."""
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
        return f"needs a device of platform {platform!r}, and this is {default_device().platform!r}"
    return IMPLEMENTATIONS[name].why_unsupported(problem)


def choose(name: str, problem: Problem) -> str:
    """The implementation that runs a problem; logs why, if it is another than `name`.

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
        raise ValueError(f"implementation={name!r} {unsupported}; write implementation='xla'")
    batch, most = problem.carry[1].shape[0], IMPLEMENTATIONS[chosen].max_batch
    if most is not None and batch > most:
        chosen, reason = "xla", f"{chosen!r} takes up to {most} sequences, got {batch}"
    if chosen != name:
        log_choice(name, chosen, reason, level)
    return chosen


def run(name: str, problem: Problem) -> Result:
    """Runs a problem by a chosen implementation; without steps or sequences, by none of them."""
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
    """How a result is sharded on an explicit mesh: its sequences as those of the inputs."""
    rows, spec = jax.typeof(problem.source).sharding.spec[1], PartitionSpec
    fields: dict[str, Any] = {"carry": spec(rows), "hidden": spec(None, rows), "moments": spec()}
    return Result(**fields)


def _validated(problem: Problem) -> tuple[str, str, int]:
    """What `auto` is for a problem, why, and the level of the log."""
    device, units = default_device(), problem.recurrent_kernel.shape[0]
    kernels = [name for name, each in IMPLEMENTATIONS.items() if each.platform == device.platform]
    validated = VALIDATED_UNITS.get(device.device_kind, 0)
    if not kernels:
        return "xla", f"there is no kernel for {device.device_kind}", logging.INFO
    if (devices := jax.device_count()) > 1:
        return "xla", f"a kernel runs on one device, and there are {devices}", logging.INFO
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
    """Logs by what an implementation is run: once, however often a layer is traced."""
    logging.getLogger(__name__).log(level, "implementation %r is %r: %s", name, chosen, reason)
