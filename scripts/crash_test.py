"""Kills a run at random moments, starts it again, and compares it with one that is not killed.

    python -m scripts.crash_test --config=configs/digits.py --kills=20

Both are runs of `experiments.main`, with the config and its overrides. Their files are compared bit
by bit: all arrays of the latest and the best checkpoint, metrics.jsonl, results and population
statistics. Kills count as `lost` if the run does not end like the other. The folder of a lost run
is kept.
"""

import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict

from experiments import config, tasks
from experiments.records import checkpoints, metrics, workdir
from experiments.runtime import cli, files, markdown, paths
from experiments.runtime.errors import UserError
from experiments.train import RESULTS_NAME

COMPARED = ("metrics.jsonl", RESULTS_NAME, "config.json")
SIGNALS = ("KILL", "KILL", "KILL", "TERM", "INT")  # each kill draws one


def define_flags() -> None:
    """The flags in addition to those of `experiments.main`."""
    flags.DEFINE_integer("kills", 20, "How often the run is killed.", lower_bound=1)
    flags.DEFINE_integer(
        "kills_per_run", 5, "After so many the run is left to end, and is compared.", lower_bound=1
    )
    paths.DEFINE_path("output", None, "File to write the outcome to.")


def command(folder: Path, words: Sequence[str]) -> list[str]:
    """The command of a run in `folder`, with this command's flags about the config."""
    own = [word for word in words if word.startswith(("--config", "-config"))]
    return [sys.executable, "-m", "experiments.main", *own, f"--workdir={folder}"]


def runs_in(folder: Path) -> list[Path]:
    """The runs of a workdir: itself, or one for each kind of model."""
    return sorted(path.parent for path in folder.glob("*/config.json")) or [folder]


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """The differences between two finished runs, in words."""
    for name in COMPARED:
        if (ours / name).read_bytes() != (theirs / name).read_bytes():
            yield f"{name} differs"
    rows = [(row["update"], row["split"]) for row in metrics.read_metrics(ours)]
    if len(rows) != len(set(rows)):
        yield f"{metrics.FILE_NAME} has a row twice"
    a, b = final_arrays(ours), final_arrays(theirs)
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            yield f"one run alone has {name}"
        elif (a[name].dtype, a[name].tobytes()) != (b[name].dtype, b[name].tobytes()):
            yield f"{name} differs"


def final_arrays(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a finished run, by name: latest and best checkpoint, population statistics."""
    saved = folder / "checkpoints"
    best = json.loads((folder / RESULTS_NAME).read_text())["update"]
    found = {}
    for kind, step in ("latest", checkpoints.steps_in(saved)[0]), ("best", best):
        arrays, _ = checkpoints.read_checkpoint(saved, step)
        found[f"{kind} checkpoint"] = {"update": step, **arrays}
    if (folder / workdir.STATISTICS_NAME).exists():
        with np.load(folder / workdir.STATISTICS_NAME) as file:
            found[workdir.STATISTICS_NAME] = dict(file)
    flat = flatten_dict(found, sep="/")
    return {name: np.asarray(array) for name, array in flat.items()}


def moment(folder: Path) -> str:
    """What the run was doing, as its files show."""
    run = runs_in(folder)[-1]
    saved = run / "checkpoints"
    if not (run / "config.json").exists():
        return "before it began"
    if saved.exists() and any("tmp" in path.name for path in saved.iterdir()):
        return "while saving"
    if not saved.exists() or not checkpoints.steps_in(saved):
        return "before the first checkpoint"
    rows = metrics.read_metrics(run)
    if rows and rows[-1]["update"] > checkpoints.steps_in(saved)[0]:
        return "past the latest checkpoint"
    return "at or after a checkpoint"


def crash(
    folder: Path, words: Sequence[str], seconds: float, kills: int, rng: random.Random
) -> Iterator[str]:
    """Starts a run again and again, kills it each time after up to `seconds`, then lets it end.

    Yields:
      For each kill, the signal and what the run was doing.

    Raises:
      UserError: the run fails by itself.
    """
    log = folder.with_suffix(".log")
    while True:
        with log.open("a") as output:
            process = subprocess.Popen(command(folder, words), stdout=output, stderr=output)
        try:
            process.wait(rng.uniform(0, seconds) if kills else None)
        except subprocess.TimeoutExpired:
            name, was = rng.choice(SIGNALS), moment(folder)
            process.send_signal(getattr(signal, f"SIG{name}"))
            if process.wait() != 0:  # else the run has ended before the signal
                kills -= 1
                yield f"SIG{name} {was}"
                continue
        if process.returncode:
            last = log.read_text().splitlines()[-1:]
            raise UserError(f"the run failed after a kill: {' '.join(last)} (see {log})")
        return


def crash_test(words: Sequence[str], total: int, per_run: int) -> dict[str, Any]:
    """The test; see the module."""
    place = Path(tempfile.mkdtemp(prefix="crash_test-"))
    unbroken = place / "unbroken"
    print(f"The run that is not killed, in {unbroken}", flush=True)
    start = time.monotonic()
    done = subprocess.run(command(unbroken, words), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the run itself fails: {done.stderr.strip().splitlines()[-1]}")
    seconds = time.monotonic() - start
    print(f"It took {seconds:.1f} s; others are killed after up to half of that", flush=True)

    rng = random.Random(0)
    survived = lost = number = 0
    moments: collections.Counter[str] = collections.Counter()
    while survived + lost < total:
        number += 1
        folder = place / f"broken_{number}"
        killed, problems = [], []
        try:
            wanted = min(per_run, total - survived - lost)
            for was in crash(folder, words, seconds / 2, wanted, rng):
                killed.append(was)
            for ours, theirs in zip(runs_in(folder), runs_in(unbroken), strict=True):
                problems += [f"{ours.name}: {line}" for line in differences(ours, theirs)]
        except (UserError, checkpoints.Damaged, OSError, KeyError, ValueError) as error:
            problems.append(str(error))
        if problems and not killed:
            raise UserError(f"the run fails by itself: {'; '.join(problems)}")
        moments.update(killed)
        if problems:
            lost += len(killed)
        else:
            survived += len(killed)
            shutil.rmtree(folder, ignore_errors=True)
        print(
            f"run {number}: {len(killed)} kills, {'; '.join(problems) or 'equal to the last bit'}"
            f"  ({survived} survived, {lost} lost, of {total})",
            flush=True,
        )
    if not lost:
        shutil.rmtree(place)
    return {
        "survived": survived,
        "lost": lost,
        "moments": dict(sorted(moments.items())),
        "seconds": round(seconds, 1),
        "commit": workdir.current_commit(),
        "command": " ".join(["python", "-m", "scripts.crash_test", *words[1:]]),
    }


def main(_: list[str]) -> None:
    """Prepares the data, tests, and prints the outcome; exits with 1 if a kill lost something."""
    given = flags.FLAGS
    config.check(given.config)
    own = given.config.copy_and_resolve_references()
    own.model.kind = config.model_kinds(own)[0]
    tasks.load(own)
    outcome = crash_test(sys.argv, given.kills, given.kills_per_run)
    rows = [(name, str(count)) for name, count in outcome["moments"].items()]
    print(f"\n{markdown.table(['killed by, when', 'times'], rows)}\n")
    print(f"{outcome['survived']} survived, {outcome['lost']} lost")
    if given.output:
        files.write_json(Path(given.output), outcome)
    if outcome["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    from experiments import main as run

    cli.run(main, define_flags, run.parse_flags)
