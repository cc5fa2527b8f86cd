"""Checks every implementation of the recurrence on this device against float64 on its CPU.

    python -m scripts.check_implementations
    python -m scripts.check_implementations --implementations=gpu --cases=masks,symbols

A case is a layer with inputs. Checked are outputs, the last state, new running statistics, and the
gradients of parameters, inputs and initial state. Expected values come from the plain scan
(`implementation="reference"`) in float64 on the CPU. The same scan in the case's own dtype on this
device shows what rounding does: an array passes if its largest error is at most 10 times that of
the scan, plus 2e-6 of its largest value. All calls with the same inputs must give the same bits:
else threads race.

Prints a line for each case and implementation. The file, written as they come, has them all, and
what was running if the process was ended. The exit status is 1 if one fails.
"""

import concurrent.futures
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from bnlstm_jax import BNLSTM, LSTM, recurrence
from bnlstm_jax.layers import abstract_problem
from bnlstm_jax.recurrence.devices import default_device
from experiments.benchmarking import timing
from experiments.runtime import cli, files, paths, progress
from experiments.runtime.errors import UserError

Arrays = dict[str, np.ndarray]


class Case(NamedTuple):
    """A layer and its inputs.

    Attributes:
      units, batch, steps: sizes.
      inputs: features of an input, or the number of symbols.
      symbols: inputs are symbols.
      padded: sequences have different lengths; one is empty.
      inference: by running statistics; else by those of the batch.
      layer: BNLSTM or LSTM.
      options: fields of the layer.
    """

    units: int
    batch: int
    steps: int
    inputs: int = 3
    symbols: bool = False
    padded: bool = False
    inference: bool = False
    layer: type[nn.Module] = BNLSTM
    options: Mapping[str, Any] = MappingProxyType({})


MEDIUM = Case(100, 100, 20)  # batch and units are no multiples of a vector or a warp
ODD = Case(7, 3, 5)
OPTIONS = {
    "masks": {"padded": True},
    "masks that count all rows": {"padded": True, "options": {"mask_statistics": False}},
    "reversed": {"padded": True, "options": {"reverse": True, "keep_order": True}},
    "statistics of sequences": {"padded": True, "options": {"input_statistics": "sequence"}},
    "symbols": {"inputs": 50, "symbols": True},
    "large inputs": {"inputs": 300},
    "recurrent term alone": {"options": {"normalize": ("recurrent",)}},
    "cell alone": {"options": {"normalize": ("cell",)}},
    "running statistics": {"inference": True, "padded": True},
    "LSTM": {"layer": LSTM},
    "LSTM with masks": {"layer": LSTM, "padded": True},
}
# Where time is short, the first matter most.
CASES = {
    "odd sizes": ODD,
    "permuted MNIST": Case(100, 100, 784, inputs=1),
    "Penn Treebank": Case(1000, 64, 20, inputs=50, symbols=True),
    "reader": Case(240, 64, 10, inputs=240, padded=True),
    # CUDA's kernel differs by the units of a block, which follow from the layer's, and by rows.
    **{
        f"{units} units of {batch} rows": Case(units, batch, 5)
        for units, batch in ((1000, 128), (1000, 32), (500, 128), (500, 32), (400, 64))
    },
    **{name: MEDIUM._replace(**fields) for name, fields in OPTIONS.items()},
    "one unit": Case(1, 2, 1),
    "more than a warp": Case(33, 33, 10),
    "batch of 127": Case(241, 127, 10, padded=True),
    "text8": Case(2000, 128, 5, inputs=27, symbols=True),
}
SMALL_CASES = {"odd sizes": ODD} | {
    name: ODD._replace(**OPTIONS[name]) for name in ("masks", "symbols", "LSTM")
}
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
# On a GPU, XLA adds to one place in any order otherwise: to the gradient of a kernel's row.
COMPILER_OPTIONS = {"gpu": {"xla_gpu_deterministic_ops": True}}
FACTOR = 10  # a maximum of rounding errors varies by less, and a fault makes more of it
# The scan's own error, of an array's largest value: beyond it something else is wrong.
LARGEST_SCAN_ERROR = {"float32": 2e-4, "bfloat16": 0.3}
FLOOR = 2e-6  # of an array's largest value: 32 roundings of float32


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list("cases", None, f"By default all: {', '.join(CASES)}.")
    flags.DEFINE_list("implementations", None, "By default all for this device.")
    flags.DEFINE_list("dtypes", list(DTYPES), f"Of products' operands: {', '.join(DTYPES)}.")
    flags.DEFINE_integer("repeats", 5, "Calls whose bits are compared.", lower_bound=1)
    flags.DEFINE_bool("small", False, "A few small cases.")
    paths.DEFINE_path("output", "check.json", "File for all results.")


# ---- One case.


def make_layer(case: Case, implementation: str, dtype: Any) -> nn.Module:
    """The layer of a case."""
    fields: dict[str, Any] = {"implementation": implementation, "dtype": dtype, **case.options}
    if case.layer is BNLSTM:
        fields |= {"max_steps": case.steps, "use_running_average": case.inference}
    if case.symbols:
        fields["vocab_size"] = case.inputs
    return case.layer(case.units, return_carry=True, **fields)


def make_arrays(case: Case) -> dict[str, Any]:
    """Arguments of `call`, in float32: random, variables near where training starts."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    batch, steps, units = case.batch, case.steps, case.units
    if case.symbols:
        inputs = random.integers(case.inputs, size=(batch, steps), dtype=np.int32)
    else:
        inputs = normal(batch, steps, case.inputs)
    lengths = np.full(batch, steps, np.int32)
    if case.padded:
        lengths = random.integers(1, steps + 1, batch, dtype=np.int32)
        lengths[0], lengths[-1] = steps, 0
    layer = make_layer(case, "xla", None)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs)

    def draw(path: tuple, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name.endswith("_var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if name.endswith("_scale"):
            return 0.1 + 0.03 * normal(*leaf.shape)
        return normal(*leaf.shape) * max(leaf.shape[0] if leaf.ndim == 2 else 25, 3) ** -0.5

    return {
        "variables": jax.tree.map_with_path(draw, shapes),
        "inputs": inputs,
        "carry": (normal(batch, units), normal(batch, units)),
        "lengths": lengths if case.padded else None,
        "weights": normal(batch, steps, units),
    }


def call(layer: nn.Module, arrays: dict[str, Any]) -> dict[str, Any]:
    """What a layer returns, and the gradients of its sum weighted at random."""
    variables = dict(arrays["variables"])
    learned = {"params": variables.pop("params"), "carry": arrays["carry"]}
    if not layer.vocab_size:
        learned["inputs"] = arrays["inputs"]

    def value(learned: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        (carry, outputs), updated = layer.apply(
            {"params": learned["params"], **variables},
            learned.get("inputs", arrays["inputs"]),
            initial_carry=learned["carry"],
            seq_lengths=arrays["lengths"],
            mutable=["batch_stats"],
        )
        total = jnp.vdot(arrays["weights"], outputs.astype(arrays["weights"].dtype))
        total += carry[0].sum() - carry[1].sum()
        return total, {"outputs": outputs, "carry": carry, **updated}

    gradients, results = jax.grad(value, has_aux=True)(learned)
    return {**results, "gradients": gradients}


def fetch(results: Any) -> Arrays:
    """Arrays by their path, such as `gradients/params/bias`, in the host's memory."""
    leaves = jax.tree.leaves_with_path(jax.device_get(results))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def compile_call(layer: nn.Module, arrays: dict[str, Any]) -> Callable[[dict[str, Any]], Arrays]:
    """The program of `call` on this device."""
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(functools.partial(call, layer)).lower(arrays)
    program = lowered.compile(COMPILER_OPTIONS.get(default_device().platform))
    return lambda arrays: fetch(program(arrays))


def expect(case: Case, arrays: dict[str, Any]) -> Arrays:
    """The values of a case, by the plain scan in float64."""
    layer = make_layer(case, "reference", None).clone(param_dtype=jnp.float64)

    def widen(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) if x.dtype == np.float32 else x

    with jax.enable_x64(True), jax.default_device(reference_device()):
        return fetch(jax.jit(functools.partial(call, layer))(jax.tree.map(widen, arrays)))


def largest_errors(found: Arrays, expected: Arrays) -> dict[str, float]:
    """The largest error of each array. What is not finite is an infinite error."""
    return {
        name: float(np.nan_to_num(np.abs(np.float64(found[name]) - value), nan=np.inf).max())
        for name, value in expected.items()
    }


def largest_values(expected: Arrays) -> dict[str, float]:
    """The largest value of each array, or a thousandth of the largest one of its kind.

    Some arrays should be zero, as the gradient of what normalisation takes away.
    """
    own = {name: float(np.abs(value).max()) for name, value in expected.items()}
    kinds = {name: name.partition("/")[0] for name in own}
    of_kind = {k: max(own[n] for n in own if kinds[n] == k) for k in kinds.values()}
    return {name: max(value, 1e-3 * of_kind[kinds[name]]) for name, value in own.items()}


def allowed_errors(of_scan: dict[str, float], expected: Arrays) -> dict[str, float]:
    """The largest error with which each array passes."""
    values = largest_values(expected)
    return {name: FACTOR * of_scan[name] + FLOOR * values[name] for name in expected}


def scan_problem(of_scan: dict[str, float], expected: Arrays, dtype: str) -> str | None:
    """Why the plain scan on this device is no measure of rounding; None if it is one."""
    values = largest_values(expected)
    for name, error in of_scan.items():
        if not error <= LARGEST_SCAN_ERROR[dtype] * values[name]:
            return f"the plain scan itself: {name} is off by {error:.1e}"
    return None


def compare(calls: Sequence[Arrays], expected: Arrays, allowed: dict[str, float]) -> dict[str, Any]:
    """Whether the results of calls with the same inputs pass, and what comes nearest to failing."""
    first, *others = calls
    found = largest_errors(first, expected)
    worst = max(found, key=lambda name: found[name] / allowed[name])
    problem = None
    if found[worst] > allowed[worst]:
        problem = f"{worst} is off by {found[worst]:.1e}, allowed are {allowed[worst]:.1e}"
    for name, value in first.items():
        if any(value.tobytes() != other[name].tobytes() for other in others):
            problem = problem or f"{name} differs between calls with the same inputs"
    outcome = "passed" if problem is None else "failed"
    share = found[worst] / allowed[worst]
    return {"outcome": outcome, "problem": problem, "nearest": worst, "share": share}


# ---- All of them.


def check_case(
    case: Case,
    dtypes: Sequence[str],
    implementations: Sequence[str],
    repeats: int,
    starting: Callable[[str, str], None] = lambda dtype, name: None,
) -> Iterator[dict[str, Any]]:
    """The results of a case: one for each dtype and implementation.

    `starting` is called before each runs.

    Raises:
      RunFailed: after the result, if one raised when it ran: on a GPU nothing runs after that.
    """
    arrays = make_arrays(case)
    names = ["reference", *implementations]
    layers = {(d, name): make_layer(case, name, DTYPES[d]) for d in dtypes for name in names}
    refused = {key: why_refused(layer, case.batch) for key, layer in layers.items()}
    # For a GPU, programs are compiled side by side; for a CPU, one alone takes all cores.
    workers = 1 if default_device().platform == "cpu" else None
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        expected = pool.submit(expect, case, arrays)
        programs = {
            key: pool.submit(compile_call, layer, arrays)
            for key, layer in layers.items()
            if refused[key] is None
        }
    refused |= {key: failure(error) for key, p in programs.items() if (error := p.exception())}
    expected = expected.result()
    arrays = jax.device_put(arrays)
    for dtype in dtypes:
        starting(dtype, "reference")
        of_scan = largest_errors(programs[dtype, "reference"].result()(arrays), expected)
        allowed = allowed_errors(of_scan, expected)
        problem = scan_problem(of_scan, expected, dtype)
        scan_failed = problem and {"outcome": "failed", "problem": problem}
        for name in implementations:
            result, raised = refused[dtype, name] or scan_failed, None
            if result is None:
                starting(dtype, name)
                program = programs[dtype, name].result()
                try:
                    result = compare([program(arrays) for _ in range(repeats)], expected, allowed)
                except Exception as error:  # of the kernel, or of the driver
                    result, raised = failure(error), error
            yield {"dtype": dtype, "implementation": name, **result}
            if raised is not None:
                raise RunFailed(name) from raised


class RunFailed(Exception):
    """An implementation raised when it ran, which may have left the device unusable."""


def why_refused(layer: nn.Module, batch: int) -> dict[str, Any] | None:
    """The result for a layer that its implementation does not run; None if it does."""
    try:
        reason = recurrence.why_unsupported(layer.implementation, abstract_problem(layer, batch))
    except Exception as error:  # of a compiler
        return failure(error)
    return None if reason is None else {"outcome": "not supported", "problem": reason}


def failure(error: Exception) -> dict[str, Any]:
    """The result for an implementation that raised an error."""
    first_line = str(error).partition("\n")[0]
    return {"outcome": "failed", "problem": f"{type(error).__name__}: {first_line}"}


def reference_device() -> jax.Device:
    """The CPU.

    Raises:
      UserError: JAX is told to leave it out.
    """
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "JAX_PLATFORMS leaves out the CPU, which computes the reference: add ,cpu"
        ) from error


def sizes_of(name: str, case: Case) -> dict[str, Any]:
    """A case as results have it."""
    return {"case": name, "units": case.units, "batch": case.batch, "steps": case.steps}


def describe(result: dict[str, Any]) -> str:
    """A result as a line."""
    sizes = "H {units}, B {batch}, T {steps}, {dtype}".format(**result)
    line = f"{result['implementation']:5}  {result['case']} ({sizes}): {result['outcome']}"
    if result.get("problem") is not None:
        return f"{line}: {result['problem']}"
    return f"{line}, {result['share']:.0%} of what is allowed, at {result['nearest']}"


def main(_: list[str]) -> None:
    """Prints a line for each result, and writes the file after each."""
    given = flags.FLAGS
    known = SMALL_CASES if given.small else CASES
    there = [name for name in recurrence.available() if name != "reference"]
    given.cases = given.cases or list(known)
    given.implementations = given.implementations or there
    timing.check_names("cases", given.cases, known)
    timing.check_names("dtypes", given.dtypes, DTYPES)
    timing.check_names("implementations", given.implementations, there)
    output = Path(given.output)
    timing.check_output(output)
    reference_device()
    results: list[dict[str, Any]] = []
    record = timing.circumstances(default_device()) | {"small": given.small, "results": results}
    record |= {"cases": given.cases, "dtypes": given.dtypes, "running": None}

    def add(result: dict[str, Any]) -> None:
        results.append(result)
        record["running"] = None
        print(describe(result), flush=True)
        files.write_json(output, record)

    implementations = []
    for name in given.implementations:  # kernels are compiled once, before all cases
        result = why_refused(make_layer(ODD, name, None), ODD.batch)
        if result is None or result["outcome"] != "failed":
            implementations.append(name)
        else:
            add({**sizes_of("compilation", ODD), "dtype": "-", "implementation": name, **result})
    for name in progress.track(given.cases, "checking", len(given.cases)):
        sizes = sizes_of(name, known[name])

        def starting(dtype: str, implementation: str, sizes: dict[str, Any] = sizes) -> None:
            record["running"] = {**sizes, "dtype": dtype, "implementation": implementation}
            files.write_json(output, record)

        found = check_case(known[name], given.dtypes, implementations, given.repeats, starting)
        try:
            for result in found:
                add(sizes | result)
        except RunFailed as error:
            print(f"Nothing is checked after {error} failed to run")
            break
    failed = sum(result["outcome"] == "failed" for result in results)
    print(f"{failed} of {len(results)} failed. All results: {output}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    cli.run(main, define_flags)
