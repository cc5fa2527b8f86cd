"""The verdict on each kernel, from the results of a validation's steps."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnlstm_jax.recurrence import IMPLEMENTATIONS
from experiments.runtime import files

SHARES = {"rates": 2, "check": 5, "benchmark": 6, "training": 4}  # of the time, by step
SLOWER = 0.95  # a kernel is slower if `xla` takes less than this part of the kernel's time
SHORTEST_TRAINING = 200  # updates; before, rounding alone moves losses as far as they fall
LEAST_GAIN = 0.8  # of the loss decrease of `xla`

Findings = dict[str, dict[str, Any]]  # the content of the steps' files, by step


class Verdict(NamedTuple):
    """The verdict on a kernel.

    Attributes:
      units: hidden units up to which it is validated; 0 if it is not.
      problems: what failed.
      missing: parts of the validation that did not run to their end.
    """

    units: int
    problems: list[str]
    missing: list[str]


def read(folder: Path) -> Findings:
    """The results of steps in a folder that are of one device and one version of the library.

    The check's results decide which; without a check, the first step with results decides.
    """
    paths = {step: folder / f"{step}.json" for step in SHARES}
    found = {step: files.read_json(path) for step, path in paths.items() if path.exists()}

    def origin(record: dict[str, Any]) -> tuple[str, str | None]:
        # Earlier records have only the commit.
        return record["machine"]["device"], record.get("library", record["commit"])

    if not found:
        return {}
    first = origin(found.get("check") or next(iter(found.values())))
    return {step: record for step, record in found.items() if origin(record) == first}


def kernels(platform: str) -> list[str]:
    """The implementations for one platform only."""
    return [name for name, each in IMPLEMENTATIONS.items() if each.platform == platform]


def checks(findings: Findings, name: str, outcome: str) -> list[dict[str, Any]]:
    """The checks of an implementation that have the given outcome.

    A check that was running when its process ended has failed.
    """
    check = findings.get("check", {})
    results = list(check.get("results", []))
    if check.get("running"):
        problem = "it was running when its process ended"
        results.append({**check["running"], "outcome": "failed", "problem": problem})
    return [r for r in results if (r["implementation"], r["outcome"]) == (name, outcome)]


def sound(findings: Findings, platform: str, units: int) -> list[str]:
    """`xla` and the platform's kernels that run layers of `units` hidden units.

    If there are checks, only kernels that passed some and failed none with at most so many units.
    """

    def is_sound(name: str) -> bool:
        failed = [each["units"] for each in checks(findings, name, "failed")]
        return bool(checks(findings, name, "passed")) and all(units < n for n in failed)

    names = kernels(platform)
    return ["xla", *(filter(is_sound, names) if "check" in findings else names)]


def medians(result: dict[str, Any]) -> dict[str, float]:
    """The median seconds of each candidate of a benchmark's result."""
    return {label: each["median"] for label, each in result["candidates"].items()}


def speedups(findings: Findings, name: str) -> dict[tuple[str, str], float]:
    """By size and dtype: the time of a BN-LSTM update by `xla`, divided by the kernel's time."""
    found = {}
    for result in findings.get("benchmark", {}).get("results", []):
        times = medians(result)
        if result["pass"] == "update" and f"BN-LSTM, {name}" in times:
            ratio = times["BN-LSTM, xla"] / times[f"BN-LSTM, {name}"]
            found[result["size"], result["dtype"]] = ratio
    return found


def gains(findings: Findings) -> dict[str, float]:
    """The fall of the training loss from its first tenth to its last, by run, if long enough."""
    losses = findings.get("training", {}).get("losses", {})
    found = {}
    for name, values in losses.items():
        tenth = len(values) // 10
        if len(values) >= SHORTEST_TRAINING:
            found[name] = float(np.mean(values[:tenth]) - np.mean(values[-tenth:]))
    return found


def limits(findings: Findings, name: str) -> list[tuple[int, str]]:
    """Numbers of hidden units at and above which a kernel is not validated, with the reason."""
    found = [
        (each["units"], f"{each['case']}, {each['dtype']}: {each['problem']}")
        for each in checks(findings, name, "failed")
    ]
    sizes = findings.get("benchmark", {}).get("sizes", {})
    for (size, dtype), ratio in speedups(findings, name).items():
        if ratio < SLOWER:
            problem = f"{size}, {dtype}: an update by xla takes {ratio:.2f} of the kernel's time"
            found.append((sizes[size]["features"], problem))
    gain = gains(findings)
    if name in gain and not gain[name] >= LEAST_GAIN * gain["xla"]:
        problem = f"in training its loss fell by {gain[name]:.3f}, that of xla by {gain['xla']:.3f}"
        found.append((0, problem))
    return found


def missing(findings: Findings, name: str, units: int) -> list[str]:
    """Parts of a kernel's validation up to `units` units that did not run to their end."""
    found = []
    if check := findings.get("check"):
        done = [(r["case"], r["dtype"]) for r in check["results"] if r["implementation"] == name]
        wanted = itertools.product(check["cases"], check["dtypes"])
        found += [f"check of {', '.join(each)}" for each in wanted if each not in done]
    else:
        found.append("check")
    if benchmark := findings.get("benchmark"):
        done = [(r["size"], r["dtype"]) for r in benchmark["results"]]
        sizes = [size for size, each in benchmark["sizes"].items() if each["features"] <= units]
        wanted = itertools.product(sizes, benchmark["flags"]["dtypes"])
        found += [f"benchmark of {', '.join(each)}" for each in wanted if each not in done]
    else:
        found.append("benchmark")
    return found + ([] if name in gains(findings) else [f"training, {SHORTEST_TRAINING} updates"])


def judge(findings: Findings, name: str) -> Verdict:
    """The verdict on a kernel."""
    bad = limits(findings, name)
    passed = [each["units"] for each in checks(findings, name, "passed")]
    units = max((n for n in passed if all(n < limit for limit, _ in bad)), default=0)
    return Verdict(units, [problem for _, problem in bad], missing(findings, name, units))
