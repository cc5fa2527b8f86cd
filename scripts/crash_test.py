"""Kills a run at random moments, starts it again, and compares it with one that nobody stopped.

    python -m scripts.crash_test --config=configs/digits.py --kills=20

Both runs are the command `experiments.main`, with the config and its overrides. What they leave is
compared bit by bit: the latest and the best checkpoint, every array of them, metrics.jsonl, results
and population statistics. A kill is counted `lost` if the run does not end like the other after it.
Data are prepared before; the folder is kept where something was lost, to look into.
"""

import json
import os
import random
import re
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
from ml_collections import ConfigDict

from experiments import config, tasks
from experiments.records import checkpoints, metrics, workdir
from experiments.runtime import cli, files, markdown, paths
from experiments.runtime.errors import UserError
from experiments.train import RESULTS_NAME

COMPARED = ("metrics.jsonl", RESULTS_NAME, "config.json")


def define_flags() -> None:
    """The flags beside those of `experiments.main`."""
    flags.DEFINE_integer("kills", 20, "How often the run is killed.", lower_bound=1)
    flags.DEFINE_integer(
        "kills_per_run", 5, "After so many the run is left to end, and is compared.", lower_bound=1
    )
    flags.DEFINE_integer("crash_seed", 0, "Of the moments and the signals.")
    flags.DEFINE_list(
        "signals", ["KILL", "KILL", "KILL", "TERM", "INT"], "From which each kill draws one."
    )
    paths.DEFINE_path("output", None, "File to write the outcome to.")


def command(folder: Path, words: Sequence[str]) -> list[str]:
    """The run's command, with the flags about the config that this one was given."""
    own = [word for word in words if word.startswith(("--config", "-config"))]
    return [sys.executable, "-m", "experiments.main", *own, f"--workdir={folder}"]


def runs_in(folder: Path) -> list[Path]:
    """The runs of a workdir: itself, or one for each kind of model."""
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    return inside or [folder]


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """What differs between two finished runs."""
    for name in COMPARED:
        if _bytes(ours / name) != _bytes(theirs / name):
            yield f"{name} differs"
    if (theirs / workdir.STATISTICS_NAME).exists():
        with (
            np.load(ours / workdir.STATISTICS_NAME) as a,
            np.load(theirs / workdir.STATISTICS_NAME) as b,
        ):
            yield from _arrays(dict(a), dict(b), workdir.STATISTICS_NAME)
    rows = [(r["update"], r["split"]) for r in metrics.read_metrics(ours)]
    if len(rows) != len(set(rows)):
        yield f"{metrics.FILE_NAME} has a row twice"
    for kind, step in steps(theirs).items():
        if steps(ours)[kind] != step:
            yield f"the {kind} checkpoint is of update {steps(ours)[kind]}, not {step}"
            continue
        a, b = (checkpoints.read_checkpoint(run / "checkpoints", step)[0] for run in (ours, theirs))
        yield from _arrays(flatten_dict(a, sep="/"), flatten_dict(b, sep="/"), f"{kind} checkpoint")


def steps(folder: Path) -> dict[str, int]:
    """The updates of a run's latest and best checkpoint."""
    results = json.loads((folder / RESULTS_NAME).read_text())
    return {"latest": checkpoints.steps_in(folder / "checkpoints")[0], "best": results["update"]}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _arrays(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> Iterator[str]:
    if ours.keys() != theirs.keys():
        yield f"{where} has other arrays"
    for name in ours.keys() & theirs.keys():
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        if a.dtype != b.dtype or a.tobytes() != b.tobytes():
            yield f"{name} of the {where} differs"


def moment(folder: Path) -> str:
    """What the run was at, by what it left."""
    runs = runs_in(folder)
    if not (runs[-1] / "config.json").exists():
        return "before it began"
    saved = runs[-1] / "checkpoints"
    if saved.exists() and any(re.search("tmp", path.name) for path in saved.iterdir()):
        return "while saving"
    if not saved.exists() or not checkpoints.steps_in(saved):
        return "before the first checkpoint"
    rows = metrics.read_metrics(runs[-1])
    latest = checkpoints.steps_in(saved)[0]
    if rows and rows[-1]["update"] > latest:
        return "past the latest checkpoint"
    return "at or after a checkpoint"


def crash(folder: Path, words: Sequence[str], seconds: float, kills: int, rng: random.Random):
    """Starts a run again and again, kills it each time, then lets it end.

    Yields:
      The signal and what the run was at, for each kill.

    Raises:
      UserError: the run fails by itself.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    log = folder.with_suffix(".log")
    for number in range(kills + 1):
        with log.open("a") as output:
            process = subprocess.Popen(
                command(folder, words), stdout=output, stderr=output, env=environment
            )
        if number < kills:
            name = rng.choice(flags.FLAGS.signals)
            try:
                process.wait(rng.uniform(0, seconds / 2))
            except subprocess.TimeoutExpired:
                was = moment(folder)
                process.send_signal(getattr(signal, f"SIG{name}"))
                if process.wait() != 0:  # else it has ended before, or does not hear the signal
                    yield name, was
                    continue
                return
        if process.wait() != 0:
            last = log.read_text().splitlines()[-1:]
            raise UserError(f"the run failed after a kill: {' '.join(last)} (see {log})")
        return


def crash_test(words: Sequence[str]) -> dict[str, Any]:
    """The test; see the module."""
    place = Path(tempfile.mkdtemp(prefix="crash_test-"))
    unbroken = place / "unbroken"
    print(f"The run that nobody stops, in {unbroken}", flush=True)
    start = time.monotonic()
    done = subprocess.run(command(unbroken, words), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the run itself fails: {done.stderr.strip().splitlines()[-1]}")
    seconds = time.monotonic() - start
    print(f"It took {seconds:.1f} s; starts are killed after up to half of that", flush=True)

    rng = random.Random(flags.FLAGS.crash_seed)
    survived = lost = number = 0
    moments: dict[str, int] = {}
    while survived + lost < flags.FLAGS.kills:
        number += 1
        folder = place / f"broken_{number}"
        wanted = min(flags.FLAGS.kills_per_run, flags.FLAGS.kills - survived - lost)
        kills, problems = 0, []
        try:
            for name, was in crash(folder, words, seconds, wanted, rng):
                kills += 1
                key = f"SIG{name} {was}"
                moments[key] = moments.get(key, 0) + 1
            for ours, theirs in zip(runs_in(folder), runs_in(unbroken), strict=True):
                problems += [f"{ours.name}: {line}" for line in differences(ours, theirs)]
        except (UserError, checkpoints.Damaged, OSError, KeyError, ValueError) as error:
            problems.append(str(error))
        if problems and not kills:
            raise UserError(f"the run fails by itself: {'; '.join(problems)}")
        if problems:
            lost += kills
        else:
            survived += kills
            shutil.rmtree(folder, ignore_errors=True)
        print(
            f"run {number}: {kills} kills, {'; '.join(problems) or 'equal to the last bit'}"
            f"  ({survived} survived, {lost} lost, of {flags.FLAGS.kills})",
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


def prepare(base: ConfigDict) -> None:
    """Prepares the data, which is not what is tested here."""
    own = base.copy_and_resolve_references()
    own.model.kind = config.model_kinds(base)[0]
    tasks.load(own)


def run_test(words: list[str]) -> None:
    """Tests, and prints what came of it."""
    config.check(flags.FLAGS.config)
    prepare(flags.FLAGS.config)
    outcome = crash_test(sys.argv)
    rows = [(name, str(count)) for name, count in outcome["moments"].items()]
    print(f"\n{markdown.table(['killed by, when', 'times'], rows)}\n")
    print(f"{outcome['survived']} survived, {outcome['lost']} lost")
    if flags.FLAGS.output:
        files.write_json(Path(flags.FLAGS.output), outcome)
    if outcome["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    from experiments import main

    cli.run(run_test, define_flags, main.parse_flags)
