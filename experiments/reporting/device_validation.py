"""What `scripts.validate_device` has found, as a page: verdicts, and what they rest on."""

import collections
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnlstm_jax.recurrence import IMPLEMENTATIONS, VALIDATED_UNITS
from experiments.runtime import files, markdown
from scripts import compare_implementations, measure_rates

SHARES = {"rates": 2, "check": 5, "benchmark": 6, "training": 4}  # of the time, by step
SLOWER = 0.95  # of the time that `xla` takes to that of a kernel: what is below counts as slower
SHORTEST_TRAINING = 200  # updates: before that, rounding alone moves losses as far as they fall
LEAST_GAIN = 0.8  # of what the loss of `xla` falls by

Findings = dict[str, dict[str, Any]]  # what each step's file holds, of those that wrote one


class Verdict(NamedTuple):
    """What was found of a kernel.

    Attributes:
      units: hidden units up to which it is validated; 0 if it is not.
      problems: what failed.
      missing: what was not run to its end.
    """

    units: int
    problems: list[str]
    missing: list[str]


def read(folder: Path) -> Findings:
    """What the steps have written into a folder so far, of one device and one commit.

    That is the device and commit of the check, or of the first step that there is.
    """
    paths = {step: folder / f"{step}.json" for step in SHARES}
    found = {step: files.read_json(file) for step, file in paths.items() if file.exists()}

    def origin(record: dict[str, Any]) -> tuple[str, str | None]:
        return record["machine"]["device"], record["commit"]

    if not found:
        return {}
    first = origin(found.get("check") or next(iter(found.values())))
    return {step: record for step, record in found.items() if origin(record) == first}


def kernels(platform: str) -> list[str]:
    """The implementations that are for one platform alone."""
    return [name for name, each in IMPLEMENTATIONS.items() if each.platform == platform]


# ---- Verdicts.


def checks(findings: Findings, name: str, outcome: str) -> list[dict[str, Any]]:
    """The results of checks of an implementation that had an outcome.

    One that was running when its process ended has failed.
    """
    check = findings.get("check", {})
    results = list(check.get("results", []))
    if check.get("running"):
        problem = "it was running when its process ended"
        results.append({**check["running"], "outcome": "failed", "problem": problem})
    return [r for r in results if (r["implementation"], r["outcome"]) == (name, outcome)]


def sound(findings: Findings) -> list[str] | None:
    """`xla`, and the kernels that passed checks and failed none; None before there are checks."""
    if "check" not in findings:
        return None
    passed = [
        name
        for name in kernels(findings["check"]["machine"]["platform"])
        if checks(findings, name, "passed") and not checks(findings, name, "failed")
    ]
    return ["xla", *passed]


def speedups(findings: Findings, name: str) -> dict[tuple[str, str], float]:
    """By size and dtype: the time of an update of BN-LSTM by `xla`, to that by `name`."""
    found = {}
    for result in findings.get("benchmark", {}).get("results", []):
        times = medians(result)
        if result["pass"] == "update" and f"BN-LSTM, {name}" in times:
            ratio = times["BN-LSTM, xla"] / times[f"BN-LSTM, {name}"]
            found[result["size"], result["dtype"]] = ratio
    return found


def medians(result: dict[str, Any]) -> dict[str, float]:
    """The median seconds of each candidate of a benchmark's result."""
    return {label: each["median"] for label, each in result["candidates"].items()}


def gains(findings: Findings) -> dict[str, float]:
    """How far the training loss fell, from its first tenth to its last, by run.

    Nothing is said of runs that are too short.
    """
    losses = findings.get("training", {}).get("losses", {})
    found = {}
    for name, values in losses.items():
        tenth = len(values) // 10
        if len(values) >= SHORTEST_TRAINING:
            found[name] = float(np.mean(values[:tenth]) - np.mean(values[-tenth:]))
    return found


def limits(findings: Findings, name: str) -> list[tuple[int, str]]:
    """Hidden units from which on a kernel is not to be taken, and why."""
    found = [
        (each["units"], f"{each['case']}, {each['dtype']}: {each['problem']}")
        for each in checks(findings, name, "failed")
    ]
    sizes = findings.get("benchmark", {}).get("sizes", {})
    for (size, dtype), ratio in speedups(findings, name).items():
        if ratio < SLOWER:
            problem = f"{size}, {dtype}: an update by xla takes {ratio:.2f} of its time"
            found.append((sizes[size]["features"], problem))
    gain = gains(findings)
    if name in gain and not gain[name] >= LEAST_GAIN * gain["xla"]:
        problem = f"in training its loss fell by {gain[name]:.3f}, that of xla by {gain['xla']:.3f}"
        found.append((0, problem))
    return found


def missing(findings: Findings, name: str, units: int) -> list[str]:
    """What of the validation of a kernel for so many units was not run, or not to its end."""
    check, benchmark = findings.get("check", {}), findings.get("benchmark", {})
    results = check.get("results", [])
    cases = [(r["case"], r["dtype"]) for r in results if r["implementation"] == name]
    wanted = itertools.product(check.get("cases", ["all cases"]), check.get("dtypes", ["-"]))
    found = [f"check of {case}, {dtype}" for case, dtype in wanted if (case, dtype) not in cases]
    sizes = [size for size, each in benchmark.get("sizes", {}).items() if each["features"] <= units]
    measured = [(r["size"], r["dtype"]) for r in benchmark.get("results", [])]
    dtypes = benchmark.get("flags", {}).get("dtypes", ["-"])
    wanted = itertools.product(sizes if benchmark else ["all sizes"], dtypes)
    found += [f"benchmark of {s}, {dtype}" for s, dtype in wanted if (s, dtype) not in measured]
    return found + ([] if name in gains(findings) else [f"training, {SHORTEST_TRAINING} updates"])


def judge(findings: Findings, name: str) -> Verdict:
    """The verdict on a kernel."""
    bad = limits(findings, name)
    passed = [each["units"] for each in checks(findings, name, "passed")]
    units = max((n for n in passed if all(n < limit for limit, _ in bad)), default=0)
    return Verdict(units, [problem for _, problem in bad], missing(findings, name, units))


def sentence(name: str, verdict: Verdict, device: str, is_rehearsal: bool = False) -> str:
    """A verdict in words, with the line that it stands for."""
    lines = []
    if is_rehearsal:
        lines.append(f"`{name}` was tried with small layers: a rehearsal, which validates nothing.")
    elif not verdict.units:
        lines.append(f"`{name}` is not validated.")
    elif verdict.missing:
        lines.append(
            f"`{name}` is not validated yet. It passed with up to {verdict.units:,} units."
        )
    else:
        lines.append(
            f"`{name}` is validated up to {verdict.units:,} units, the most that passed. "
            f"{table_line(verdict.units, device)}"
        )
    lines += [f"- {problem}" for problem in verdict.problems]
    if verdict.missing and not is_rehearsal:
        lines.append(f"- Not run to the end: {'; '.join(verdict.missing)}.")
    return "\n".join(lines)


def table_line(units: int, device: str) -> str:
    """The line of a verdict in the table that `auto` reads, if it is to change."""
    now = VALIDATED_UNITS.get(device, 0)
    if now == units:
        return "So `VALIDATED_UNITS` has it."
    if now > units:
        return f"`VALIDATED_UNITS` has more: {now}."
    before = f"now {now}" if now else "not there yet"
    line = f'`"{device}": {units},` ({before})'
    return f"In `VALIDATED_UNITS` of `bnlstm_jax/recurrence/__init__.py` that is {line}."


# ---- The page.


def page(findings: Findings, steps: list[tuple[str, str, str]], command: str) -> str:
    """The report in Markdown.

    Args:
      findings: what the steps have written.
      steps: each with its outcome and its seconds.
      command: what was called.
    """
    parts = []
    if findings:
        record = next(iter(findings.values()))
        machine, versions = record["machine"], record["versions"]
        is_small = findings.get("check", {}).get("small", False)
        parts += [
            f"# {machine['device']}",
            f"`{command}`, commit {record['commit']}, {record['date']}, JAX {versions['jax']}, "
            f"PyTorch {versions['torch'] or 'not installed'}; {machine['processor']}, "
            f"{machine['cores']} cores.",
            "## Verdict",
            *(
                sentence(name, judge(findings, name), machine["device"], is_small)
                for name in kernels(machine["platform"])
            ),
        ]
    parts += ["## Steps", markdown.table(["step", "outcome", "seconds"], steps)]
    if "rates" in findings:
        parts += ["## Rates", measure_rates.table(findings["rates"]["rates"])]
    if "check" in findings:
        parts += ["## Checks against float64", *check_parts(findings)]
    if "benchmark" in findings:
        parts += ["## Time of an update", *benchmark_parts(findings["benchmark"])]
    if "training" in findings:
        training = findings["training"]
        parts += [
            f"## Training: {training['config']}",
            compare_implementations.table(training["losses"]),
            "Picture: `training.png`.",
        ]
    return "\n\n".join(parts) + "\n"


def check_parts(findings: Findings) -> list[str]:
    """How many checks passed, by implementation and dtype, and what became of the others."""
    results = findings["check"]["results"]
    counts = collections.Counter((r["implementation"], r["dtype"], r["outcome"]) for r in results)
    kinds = dict.fromkeys((r["implementation"], r["dtype"]) for r in results)
    outcomes = ("passed", "failed", "not supported")
    rows = []
    for name, dtype in kinds:
        passed = [r for r in checks(findings, name, "passed") if r["dtype"] == dtype]
        nearest = max(passed, key=lambda r: r["share"], default=None)
        share = f"{nearest['share']:.0%}, {nearest['case']}" if nearest else "-"
        rows.append((name, dtype, *(str(counts[name, dtype, each]) for each in outcomes), share))
    header = ["implementation", "dtype", *outcomes, "largest error, of what is allowed"]
    parts = [markdown.table(header, rows)]
    others = dict.fromkeys(
        f"- {r['implementation']}, {r['case']}, {r['dtype']}: {r['outcome']}: {r['problem']}"
        for r in results
        if r["outcome"] == "failed"
    )
    refused = collections.Counter(
        (r["implementation"], r["dtype"], r["problem"])
        for r in results
        if r["outcome"] == "not supported"
    )
    reasons = [
        f"- {name}, {dtype}, not supported in {count} cases: {problem}"
        for (name, dtype, problem), count in refused.items()
    ]
    return parts + ["\n".join(found) for found in (others, reasons) if found]


def benchmark_parts(benchmark: dict[str, Any]) -> list[str]:
    """Milliseconds of an update: a row for each candidate, a column for each size and dtype."""
    results = [r for r in benchmark["results"] if r["pass"] == "update"]
    names = dict.fromkeys(name for r in results for name in r["candidates"])
    header = ["ms", *(f"{r['size']}, {r['dtype']}" for r in results)]
    rows = [
        (name, *(f"{1e3 * t[name]:.1f}" if name in t else "-" for t in map(medians, results)))
        for name in names
    ]
    return [markdown.table(header, rows)]
