"""Validates the implementations of the recurrence on the device at hand, in one call.

    python -m scripts.validate_device --device=gpu --data_dir=data
    python -m scripts.validate_device --device=gpu --minutes=15 --only=check,benchmark
    python -m scripts.validate_device --small      # a rehearsal, a minute on a CPU

Four commands run one after the other, each in a process of its own:

    rates      scripts.measure_rates: what the device can do
    check      scripts.check_implementations: every implementation against float64
    benchmark  scripts.benchmark: the paper's four sizes, and other libraries' layers
    training   scripts.compare_implementations: permuted MNIST

Kernels that failed a check are left out of the last two.

`--minutes` is shared out among them; time that one leaves goes to the next. One that fails, hangs
or runs out of time does not end the others, and what it has written counts. `report.md` in the
output folder is renewed after each: a verdict for each kernel, and the line for `VALIDATED_UNITS`,
from which `implementation="auto"` knows the devices that a kernel may run on.

The exit status is 1 if a step failed, a check among them, or if time was up before all was checked.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import datasets
from experiments.benchmarking import timing
from experiments.reporting import device_validation
from experiments.reporting.device_validation import SHARES
from experiments.runtime import cli, files, paths
from experiments.runtime.errors import UserError

# Kernels multiply in float32, XLA on a GPU in tf32 unless it is told to.
ENVIRONMENT = {"training": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}}
# Without the device named, no step runs on another. The CPU computes what is expected.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
SECONDS_TO_END = 10  # after a step was asked to end


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_float("minutes", 15, "Time for all steps.", lower_bound=0.1)
    flags.DEFINE_list("only", list(SHARES), f"Steps to run, of {', '.join(SHARES)}.")
    paths.DEFINE_path("data_dir", "data", "Folder of the data to train on.")
    flags.DEFINE_bool("small", False, "Tiny layers, and digits to train on: a rehearsal.")
    flags.DEFINE_enum("device", None, list(PLATFORMS), "Which has to be there; else JAX chooses.")
    paths.DEFINE_path(
        "output", None, "Folder for the report and all results; validation, or rehearsal if small."
    )


def command(step: str, given: Any, folder: Path, seconds: float) -> list[str]:
    """The command of a step that is to take at most so many seconds."""
    modules = {
        "rates": "measure_rates",
        "check": "check_implementations",
        "benchmark": "benchmark",
        "training": "compare_implementations",
    }
    words = [sys.executable, "-m", f"scripts.{modules[step]}", f"--output={folder / step}.json"]
    sound = device_validation.sound(device_validation.read(folder))
    if sound is not None and step in ("benchmark", "training"):
        words.append(f"--implementations={','.join(sound)}")
    if step == "training":
        # The rest of the time is for compiling and the picture.
        words += [f"--minutes={0.8 * seconds / 60:.2f}", "--bfloat16="]
        words += [f"--config=configs/{'digits' if given.small else 'pmnist'}.py"]
        words += [f"--config.data_dir={given.data_dir}", "--config.model.kind=bn_lstm"]
        words += [f"--updates={20 if given.small else 100_000}"]
    elif given.small:
        words.append("--small")
    if step == "benchmark":
        words.append("--passes=update")
        words += ["--dtypes=float32", "--rounds=2"] if given.small else []
    return words


def run(words: Sequence[str], environment: dict[str, str], seconds: float) -> str:
    """Runs a step; what became of it."""
    print(f"\n$ {shlex.join(words)}\n", flush=True)
    process = subprocess.Popen(words, env=os.environ | environment, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        end(process)
        return "its time was up"
    except BaseException:
        end(process)
        raise
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return "done" if status == 0 else f"failed, exit status {status}"


def end(process: subprocess.Popen) -> None:
    """Ends a process and those that it started; waits no longer than it may take."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)


def main(_: list[str]) -> None:
    """Runs the steps, and writes the report after each."""
    given = flags.FLAGS
    timing.check_names("only", given.only, SHARES)
    folder = Path(given.output or ("rehearsal" if given.small else "validation"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={folder} cannot be made: {error.strerror}") from error
    if "training" in given.only and not given.small:
        datasets.load("mnist", given.data_dir)  # downloads it, or says why not, before all else
    for step in given.only:
        (folder / f"{step}.json").unlink(missing_ok=True)  # of an earlier call
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and the step, too
    platforms = {"JAX_PLATFORMS": PLATFORMS[given.device]} if given.device else {}
    deadline = time.monotonic() + 60 * given.minutes
    steps: list[tuple[str, str, str]] = []
    todo = [step for step in SHARES if step in given.only]
    for index, step in enumerate(todo):
        start = time.monotonic()
        share = SHARES[step] / sum(SHARES[each] for each in todo[index:])
        limit = max(share * (deadline - start), 1)
        environment = platforms | ENVIRONMENT.get(step, {})
        outcome = run(command(step, given, folder, limit), environment, limit)
        steps.append((step, outcome, f"{time.monotonic() - start:.0f}"))
        write_report(folder, steps)
    report = folder / "report.md"
    print(f"\n{report.read_text(encoding='utf-8')}\nReport: {report}")
    is_whole = all(
        outcome == "done" or (step != "check" and outcome == "its time was up")
        for step, outcome, _ in steps
    )
    sys.exit(not is_whole)


def write_report(folder: Path, steps: list[tuple[str, str, str]]) -> None:
    """Writes `report.md`. What is wrong with a report does not end the steps."""
    called = shlex.join(["python", "-m", "scripts.validate_device", *sys.argv[1:]])
    try:
        page = device_validation.page(device_validation.read(folder), steps, called)
    except Exception:
        page = f"The report cannot be made:\n\n```\n{traceback.format_exc()}```\n"
    files.write_text(folder / "report.md", page)


if __name__ == "__main__":
    cli.run(main, define_flags)
