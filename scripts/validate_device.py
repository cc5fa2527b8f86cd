"""Validates the implementations of the recurrence on a device.

    python -m scripts.validate_device --device=gpu --data_dir=data
    python -m scripts.validate_device --device=gpu --minutes=15 --only=check,benchmark
    python -m scripts.validate_device --small      # a rehearsal, a minute on a CPU

Four steps run one after the other, each in a process of its own:

    rates      what the device can do: products, copies, steps of a scan
    check      every implementation against float64
    benchmark  four sizes of layers, beside other libraries' layers
    training   permuted MNIST by each implementation

For each layer, the last two steps leave out kernels that failed a check of a layer of the same size
or smaller.

The steps share `--minutes`; later steps get the time that a step leaves. A step that fails, hangs
or runs out of time does not end the others. Its results so far count, except those of training,
which are written at its end. `report.md` in the output folder is rewritten after each step. It has
a verdict for each kernel, and the line for `VALIDATED_UNITS`, which lists the devices where
`implementation="auto"` selects a kernel.

`--step=check` runs one step in this process, for example under compute-sanitizer.

The exit status is 1 if a step or a check failed, or if time ran out before all checks were done.
"""

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from configs import digits, pmnist
from experiments import datasets
from experiments.benchmarking import benchmark, programs, timing
from experiments.runtime import cli, files, paths
from experiments.validation import check, rates, report, training, verdict
from experiments.validation.verdict import SHARES

SECONDS_TO_END = 10  # to wait for a step to end, after each signal
USER_ERROR = 2  # exit status of `cli.run`


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_float("minutes", 15, "Time for all steps together, in minutes.", lower_bound=0.1)
    flags.DEFINE_list("only", list(SHARES), f"Steps to run, of {', '.join(SHARES)}.")
    flags.DEFINE_enum("step", None, list(SHARES), "Runs this step alone, in this process.")
    flags.DEFINE_list("cases", None, f"Cases to check; by default all: {', '.join(check.CASES)}.")
    paths.DEFINE_path("data_dir", "data", "Folder of the data to train on.")
    flags.DEFINE_bool("small", False, "Tiny layers, and digits to train on: a rehearsal.")
    flags.DEFINE_enum("device", None, timing.DEVICES, "Device; by default the one JAX chooses.")
    paths.DEFINE_path(
        "output", None, "Folder for the report and all results; validation, or rehearsal if small."
    )


# ---- One step, in its own process.


def run_step(step: str, given: Any, folder: Path, minutes: float) -> None:
    """Runs a step on a device; exits with status 1 if a check failed."""
    device, output = timing.use_device(given.device), folder / f"{step}.json"
    sound = functools.partial(verdict.sound, verdict.read(folder), device.platform)
    if step == "rates":
        rates.run(given.small, output)
    elif step == "check":
        known = check.SMALL_CASES if given.small else check.CASES
        cases = {name: known[name] for name in given.cases or known}
        sys.exit(1 if check.run(cases, given.small, output) else 0)
    elif step == "benchmark":
        run_benchmark(given.small, sound, output)
    else:
        run_training(given, sound, 60 * minutes, output)


def run_benchmark(small: bool, sound: Callable[[int], list[str]], output: Path) -> None:
    """Times an update at the paper's sizes; `sound` gives the implementations for some units."""
    sizes = {name: size.small() if small else size for name, size in programs.SIZES.items()}
    dtypes = ["float32"] if small else list(programs.DTYPES)
    recorded = {"dtypes": dtypes, "passes": ["update"], "small": small}
    rounds = 2 if small else 7
    implementations = {name: sound(size.features) for name, size in sizes.items()}
    benchmark.run(sizes, dtypes, ["update"], implementations, rounds, output, recorded)


def run_training(
    given: Any, sound: Callable[[int], list[str]], seconds: float, output: Path
) -> None:
    """Trains a BN-LSTM with each implementation."""
    # Kernels multiply in float32. XLA on a GPU multiplies in tf32 by default.
    jax.config.update("jax_default_matmul_precision", "highest")
    config, name = (digits, "digits") if given.small else (pmnist, "pmnist")
    config = config.get_config()
    config.data_dir, config.model.kind = given.data_dir, "bn_lstm"
    title = f"configs/{name}.py, bn_lstm, seed {config.seed}"
    updates = 20 if given.small else 100_000
    # Loading and compiling need the rest of the time.
    implementations = sound(config.model.features)
    training.run(config, title, implementations, updates, 0.8 * seconds, output)


# ---- All steps.


def command(step: str, folder: Path, seconds: float) -> list[str]:
    """The command of a step with a time limit: the command of this process with more flags."""
    more = [f"--step={step}", f"--output={folder}", f"--minutes={max(seconds / 60, 0.1)}"]
    return [sys.executable, "-m", "scripts.validate_device", *sys.argv[1:], *more]


def run(words: Sequence[str], seconds: float) -> str:
    """Runs a step; returns its outcome.

    Raises:
      SystemExit: the user made a mistake, which the step has reported.
    """
    print(f"\n$ {shlex.join(words)}\n", flush=True)
    process = subprocess.Popen(words, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        end(process)
        return "timed out"
    except BaseException:
        end(process)
        raise
    if status == USER_ERROR:
        sys.exit(status)
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return "done" if status == 0 else f"failed, exit status {status}"


def end(process: subprocess.Popen) -> None:
    """Ends the group of a process: sends SIGTERM, then SIGKILL, and waits briefly after each."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)


def write_report(folder: Path, steps: list[tuple[str, str, str]]) -> None:
    """Writes `report.md`. An error in the report goes into the file and does not end the steps."""
    called = shlex.join(["python", "-m", "scripts.validate_device", *sys.argv[1:]])
    try:
        page = report.page(verdict.read(folder), steps, called)
    except Exception:
        page = f"The report cannot be made:\n\n```\n{traceback.format_exc()}```\n"
    files.write_text(folder / "report.md", page)


def run_steps(names: Sequence[str], folder: Path, minutes: float) -> list[tuple[str, str, str]]:
    """Runs the steps; returns name, outcome and seconds of each. Writes the report after each."""
    deadline = time.monotonic() + 60 * minutes
    steps: list[tuple[str, str, str]] = []
    for index, step in enumerate(names):
        start = time.monotonic()
        share = SHARES[step] / sum(SHARES[each] for each in names[index:])
        limit = max(share * (deadline - start), 1)
        outcome = run(command(step, folder, limit), limit)
        steps.append((step, outcome, f"{time.monotonic() - start:.0f}"))
        write_report(folder, steps)
    return steps


def main(_: list[str]) -> None:
    """Runs the steps and prints the report."""
    given = flags.FLAGS
    timing.check_names("only", given.only, SHARES)
    if given.cases:
        timing.check_names("cases", given.cases, check.SMALL_CASES if given.small else check.CASES)
    folder = Path(given.output or ("rehearsal" if given.small else "validation"))
    folder.mkdir(parents=True, exist_ok=True)
    paths.check_output(folder / "report.md")
    if given.step:
        run_step(given.step, given, folder, given.minutes)
        return
    if "training" in given.only and not given.small:
        datasets.load("mnist", given.data_dir)  # a failed download raises before any step
    for step in given.only:
        (folder / f"{step}.json").unlink(missing_ok=True)  # results of an earlier call
    for number in (signal.SIGTERM, signal.SIGHUP):  # end the step too
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    steps = run_steps([step for step in SHARES if step in given.only], folder, given.minutes)
    path = folder / "report.md"
    print(f"\n{path.read_text(encoding='utf-8')}\nReport: {path}")
    is_whole = all(
        outcome == "done" or (step != "check" and outcome == "timed out")
        for step, outcome, _ in steps
    )
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    cli.run(main, define_flags)
