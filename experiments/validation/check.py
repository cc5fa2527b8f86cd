"""Checks every implementation of the recurrence on a device against float64 on its CPU.

A case is a layer with inputs. The check compares outputs, the last state, new running statistics,
and the gradients of parameters, inputs and initial state. Expected values come from the plain scan
(`reference`) in float64 on the CPU. The plain scan in the tested dtype on the device shows the size
of rounding errors: an array passes if its error is at most 10 times the scan's error, plus 2e-6.
Errors are relative to the array's largest value. Calls with the same inputs must give the same
bits; if they do not, threads race.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnlstm_jax import BNLSTM, LSTM, recurrence
from bnlstm_jax.layers import abstract_problem
from bnlstm_jax.recurrence.devices import default_device
from experiments.benchmarking import timing
from experiments.benchmarking.programs import DTYPES
from experiments.runtime import files, progress
from experiments.runtime.errors import UserError

Arrays = dict[str, np.ndarray]
Result = dict[str, Any]


class Case(NamedTuple):
    """A layer and its inputs.

    Attributes:
      units, batch, steps: hidden units H, sequences B, time steps T.
      inputs: features of an input, or the number of symbols.
      symbols: inputs are symbols.
      padded: sequences differ in length; one is empty.
      inference: normalise by running statistics; else by batch statistics.
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

    def shrunk(self, units: int, batch: int, steps: int) -> "Case":
        """The case with at most these sizes."""
        return self._replace(
            units=min(self.units, units),
            batch=min(self.batch, batch),
            steps=min(self.steps, steps),
        )


medium = functools.partial(Case, 100, 100, 20)  # not multiples of a vector's or a warp's size
# The most important cases come first, in case time runs out.
CASES = {
    "odd sizes": Case(7, 3, 5),
    "permuted MNIST": Case(100, 100, 784, inputs=1),
    "Penn Treebank": Case(1000, 64, 20, inputs=50, symbols=True),
    "reader": Case(240, 64, 10, inputs=240, padded=True),
    # The CUDA kernel is compiled for a number of rows, and for a number of units of a block, which
    # depends on the layer's units.
    "1000 units of 128 rows": Case(1000, 128, 5),
    "1000 units of 32 rows": Case(1000, 32, 5),
    "500 units of 128 rows": Case(500, 128, 5),
    "500 units of 32 rows": Case(500, 32, 5),
    "400 units of 64 rows": Case(400, 64, 5),
    "masks": medium(padded=True),
    "masks that count all rows": medium(padded=True, options={"mask_statistics": False}),
    "reversed": medium(padded=True, options={"reverse": True, "keep_order": True}),
    "statistics of sequences": medium(padded=True, options={"input_statistics": "sequence"}),
    "symbols": medium(inputs=50, symbols=True),
    "large inputs": medium(inputs=300),
    "recurrent term alone": medium(options={"normalize": ("recurrent",)}),
    "cell alone": medium(options={"normalize": ("cell",)}),
    "running statistics": medium(inference=True, padded=True),
    "LSTM": medium(layer=LSTM),
    "LSTM with masks": medium(layer=LSTM, padded=True),
    "one unit": Case(1, 2, 1),
    "more than a warp": Case(33, 33, 10),
    "batch of 127": Case(241, 127, 10, padded=True),
    "text8": Case(2000, 128, 5, inputs=27, symbols=True),
}
ODD = CASES["odd sizes"]
SMALL_CASES = {
    name: CASES[name].shrunk(*ODD[:3]) for name in ("odd sizes", "masks", "symbols", "LSTM")
}
REPEATS = 5  # calls whose bits are compared
# Otherwise XLA on a GPU sums scattered values in any order, as in the gradient of a kernel's row.
COMPILER_OPTIONS = {"gpu": {"xla_gpu_deterministic_ops": True}}
FACTOR = 10  # the largest rounding errors vary by a smaller factor; a fault exceeds it
FLOOR = 2e-6  # 32 roundings of float32
LARGEST_SCAN_ERROR = {"float32": 2e-4, "bfloat16": 0.3}  # above it, the error is not rounding


# ---- One call.


def make_layer(case: Case, implementation: str, dtype: Any) -> nn.Module:
    """The layer of a case."""
    fields: dict[str, Any] = {"implementation": implementation, "dtype": dtype, **case.options}
    if case.layer is BNLSTM:
        fields |= {"max_steps": case.steps, "use_running_average": case.inference}
    if case.symbols:
        fields["vocab_size"] = case.inputs
    return case.layer(case.units, return_carry=True, **fields)


def make_arrays(case: Case) -> dict[str, Any]:
    """Arguments of `call`, in float32: random, with variables near their initial values."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    batch, steps, units = case.batch, case.steps, case.units
    if case.symbols:
        inputs = random.integers(case.inputs, size=(batch, steps), dtype=np.int32)
    else:
        inputs = normal(batch, steps, case.inputs)
    lengths = None
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
        "lengths": lengths,
        "weights": normal(batch, steps, units),
    }


def call(layer: nn.Module, arrays: dict[str, Any]) -> dict[str, Any]:
    """The results of a layer, and the gradients of their randomly weighted sum."""
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
    """Arrays on the host, by their path such as `gradients/params/bias`."""
    leaves = jax.tree.leaves_with_path(jax.device_get(results))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def compile_call(layer: nn.Module, arrays: dict[str, Any]) -> Callable[[dict[str, Any]], Arrays]:
    """The program of `call` on the default device."""
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(functools.partial(call, layer)).lower(arrays)
    program = lowered.compile(COMPILER_OPTIONS.get(default_device().platform))
    return lambda arrays: fetch(program(arrays))


def expect(case: Case, arrays: dict[str, Any]) -> Arrays:
    """The expected values of a case, from the plain scan in float64."""
    layer = make_layer(case, "reference", None).clone(param_dtype=jnp.float64)

    def widen(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) if x.dtype == np.float32 else x

    with jax.enable_x64(True), jax.default_device(reference_device()):
        return fetch(jax.jit(functools.partial(call, layer))(jax.tree.map(widen, arrays)))


def reference_device() -> jax.Device:
    """The CPU.

    Raises:
      UserError: JAX_PLATFORMS leaves it out.
    """
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "JAX_PLATFORMS leaves out the CPU, which computes the reference: add ,cpu"
        ) from error


# ---- Errors.


def relative_errors(found: Arrays, expected: Arrays) -> dict[str, float]:
    """The largest error of each array, relative to its largest value.

    The divisor is at least a thousandth of the largest value of the same kind (`outputs`,
    `gradients`, ...), because some arrays should be zero, such as gradients that normalisation
    removes. Non-finite values give an infinite error.
    """
    largest = {name: float(np.abs(value).max()) for name, value in expected.items()}
    of_kind: dict[str, float] = {}
    for name, value in largest.items():
        kind = name.partition("/")[0]
        of_kind[kind] = max(value, of_kind.get(kind, 0))
    errors = {}
    for name, value in expected.items():
        error = np.nan_to_num(np.abs(np.float64(found[name]) - value), nan=np.inf).max()
        errors[name] = float(error / max(largest[name], 1e-3 * of_kind[name.partition("/")[0]]))
    return errors


def scan_problem(of_scan: dict[str, float], dtype: str) -> str | None:
    """Why the plain scan's errors are too large to be rounding; None if they are not."""
    worst = max(of_scan, key=of_scan.__getitem__)
    if of_scan[worst] <= LARGEST_SCAN_ERROR[dtype]:
        return None
    return f"the plain scan is wrong: {worst} is off by {of_scan[worst]:.1e}"


def compare(calls: Sequence[Arrays], expected: Arrays, of_scan: dict[str, float]) -> Result:
    """Whether calls with the same inputs pass, and which array comes nearest to failing."""
    first, *others = calls
    found = relative_errors(first, expected)
    allowed = {name: FACTOR * error + FLOOR for name, error in of_scan.items()}
    worst = max(found, key=lambda name: found[name] / allowed[name])
    problem = None
    if found[worst] > allowed[worst]:
        problem = f"{worst} is off by {found[worst]:.1e} of its largest value; at most "
        problem += f"{allowed[worst]:.1e} is allowed"
    for name, value in first.items():
        if any(value.tobytes() != other[name].tobytes() for other in others):
            problem = problem or f"{name} differs between calls with the same inputs"
    outcome = "passed" if problem is None else "failed"
    share = found[worst] / allowed[worst]
    return {"outcome": outcome, "problem": problem, "nearest": worst, "share": share}


def failure(error: BaseException) -> Result:
    """The result of an implementation that raised an error."""
    first_line = str(error).partition("\n")[0]
    return {"outcome": "failed", "problem": f"{type(error).__name__}: {first_line}"}


def refusal(layer: nn.Module, batch: int) -> Result | None:
    """The result of a layer that its implementation does not support; None if it does."""
    try:
        reason = recurrence.why_unsupported(layer.implementation, abstract_problem(layer, batch))
    except Exception as error:  # from a compiler
        return failure(error)
    return None if reason is None else {"outcome": "not supported", "problem": reason}


# ---- All cases.


def check_case(
    case: Case, dtypes: Sequence[str], implementations: Sequence[str], repeats: int = REPEATS
) -> Iterator[Result]:
    """Yields the results of a case, and before each run a result with outcome `running`.

    Ends early after a result with `is_fatal`: an implementation raised when it ran, which may have
    left the device unusable.
    """
    arrays = make_arrays(case)
    names = ["reference", *implementations]
    layers = {(d, name): make_layer(case, name, DTYPES[d]) for d in dtypes for name in names}
    refused = {key: refusal(layer, case.batch) for key, layer in layers.items()}
    # GPU programs are compiled in parallel; for a CPU, one compilation uses all cores.
    workers = 1 if default_device().platform == "cpu" else None
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        expecting = pool.submit(expect, case, arrays)
        programs = {
            key: pool.submit(compile_call, layer, arrays)
            for key, layer in layers.items()
            if refused[key] is None
        }
    refused |= {key: failure(error) for key, p in programs.items() if (error := p.exception())}
    expected = expecting.result()
    arrays = jax.device_put(arrays)
    for dtype in dtypes:
        yield {"dtype": dtype, "implementation": "reference", "outcome": "running"}
        of_scan = relative_errors(programs[dtype, "reference"].result()(arrays), expected)
        problem = scan_problem(of_scan, dtype)
        for name in implementations:
            own = {"dtype": dtype, "implementation": name}
            if (result := refused[dtype, name]) is not None:
                yield own | result
            elif problem is not None:
                yield own | {"outcome": "failed", "problem": problem}
            else:
                yield own | {"outcome": "running"}
                program = programs[dtype, name].result()
                try:
                    calls = [program(arrays) for _ in range(repeats)]
                except Exception as error:  # from the kernel, or from the driver
                    yield own | failure(error) | {"is_fatal": True}
                    return
                yield own | compare(calls, expected, of_scan)


def check_cases(
    cases: Mapping[str, Case], dtypes: Sequence[str], implementations: Sequence[str]
) -> Iterator[Result]:
    """Yields the results of `check_case` for all cases, with the case's name and sizes."""

    def named(name: str, case: Case, result: Result) -> Result:
        sizes = {"case": name, "units": case.units, "batch": case.batch, "steps": case.steps}
        return sizes | result

    sound = []
    for name in implementations:  # kernels are compiled once, before all cases
        result = refusal(make_layer(ODD, name, None), ODD.batch)
        if result is None or result["outcome"] != "failed":
            sound.append(name)
        else:
            yield named("compilation", ODD, {"dtype": "-", "implementation": name, **result})
    for name in progress.track(cases, "checking", len(cases)):
        for result in check_case(cases[name], dtypes, sound):
            yield named(name, cases[name], result)
            if result.get("is_fatal"):
                return


def run(cases: Mapping[str, Case], small: bool, output: Path) -> int:
    """Checks the default device; prints a line for each result and rewrites the file.

    The file names all existing cases, and the check that was running if the process ended early.

    Returns:
      The number of failed checks.
    """
    reference_device()
    implementations = [name for name in recurrence.available() if name != "reference"]
    results: list[Result] = []
    record = timing.circumstances(default_device()) | {"small": small, "results": results}
    record |= {
        "cases": list(SMALL_CASES if small else CASES),
        "dtypes": list(DTYPES),
        "running": None,
    }
    for result in check_cases(cases, list(DTYPES), implementations):
        is_running = result["outcome"] == "running"
        record["running"] = result if is_running else None
        if not is_running:
            results.append(result)
            print(describe(result), flush=True)
        files.write_json(output, record)
    failed = sum(result["outcome"] == "failed" for result in results)
    print(f"{failed} of {len(results)} checks failed. All results: {output}")
    return failed


def describe(result: Result) -> str:
    """A result as a line."""
    sizes = "H {units}, B {batch}, T {steps}, {dtype}".format(**result)
    line = f"{result['implementation']:5}  {result['case']} ({sizes}): {result['outcome']}"
    if result.get("problem") is not None:
        return f"{line}: {result['problem']}"
    return f"{line}, {result['share']:.0%} of the allowed error, at {result['nearest']}"
