"""What `scripts.validate_device` has found, as a page: verdicts, and what they rest on."""

import collections
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnlstm_jax.recurrence import IMPLEMENTATIONS, VALIDATED_UNITS
from experiments import metrics, workdir
from scripts import compare_implementations, measure_rates

STEPS = ("rates", "check", "benchmark", "training")
TIMES_ROUNDING = 3  # as far apart, in the median, as two runs that differ by a rounding

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
    """What the steps have written into a folder so far."""
    files = {step: folder / f"{step}.json" for step in STEPS}
    return {step: workdir.read_json(file) for step, file in files.items() if file.exists()}


def kernels(platform: str) -> list[str]:
    """The implementations that are for one platform alone."""
    return [name for name, each in IMPLEMENTATIONS.items() if each.platform == platform]


# ---- Verdicts.


def checks(findings: Findings, name: str, outcome: str) -> list[dict[str, Any]]:
    """The results of checks of an implementation that had an outcome."""
    results = findings.get("check", {}).get("results", [])
    return [r for r in results if (r["implementation"], r["outcome"]) == (name, outcome)]


def trainable(findings: Findings) -> list[str]:
    """The implementations that passed checks and failed none, `xla` first."""
    names = ["xla", *IMPLEMENTATIONS]
    return [
        name
        for name in dict.fromkeys(names)
        if checks(findings, name, "passed") and not checks(findings, name, "failed")
    ]


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


def distances(findings: Findings) -> dict[str, float]:
    """How far training losses are from the first run's: the median over updates, by run."""
    losses = findings.get("training", {}).get("losses", {})
    apart = compare_implementations.differences(losses) if losses else {}
    return {name: float(np.median(values)) for name, values in apart.items()}


def limits(findings: Findings, name: str) -> list[tuple[int, str]]:
    """Hidden units from which on a kernel is not to be taken, and why."""
    found = [
        (each["units"], f"{each['case']}, {each['dtype']}: {each['problem']}")
        for each in checks(findings, name, "failed")
    ]
    sizes = findings.get("benchmark", {}).get("sizes", {})
    for (size, dtype), ratio in speedups(findings, name).items():
        if ratio < 1:
            problem = f"{size}, {dtype}: an update by xla takes {ratio:.2f} of its time"
            found.append((sizes[size]["features"], problem))
    apart = distances(findings)
    if name in apart:
        (rounding, *_) = apart.values()
        if not apart[name] <= TIMES_ROUNDING * rounding:
            problem = f"losses are {apart[name]:.1e} apart in training, {rounding:.1e} by rounding"
            found.append((0, problem))
    return found


def missing(findings: Findings, name: str) -> list[str]:
    """What of a kernel's validation was not run, or not to its end."""
    check, benchmark = findings.get("check", {}), findings.get("benchmark", {})
    results = [r["case"] for r in check.get("results", []) if r["implementation"] == name]
    found = [f"check of {case}" for case in check.get("cases", ["all"]) if case not in results]
    measured = [r["size"] for r in benchmark.get("results", []) if r["pass"] == "update"]
    sizes = benchmark.get("sizes", ["all"])
    found += [f"benchmark of {size}" for size in sizes if size not in measured]
    return found + ([] if name in distances(findings) else ["training"])


def judge(findings: Findings, name: str) -> Verdict:
    """The verdict on a kernel."""
    bad = limits(findings, name)
    passed = [each["units"] for each in checks(findings, name, "passed")]
    units = max((n for n in passed if all(n < limit for limit, _ in bad)), default=0)
    return Verdict(units, [problem for _, problem in bad], missing(findings, name))


def sentence(name: str, verdict: Verdict, device: str, is_rehearsal: bool = False) -> str:
    """A verdict in words, with the line that it stands for."""
    lines = []
    if is_rehearsal:
        lines.append(f"`{name}` was tried with small layers: a rehearsal, which validates nothing.")
    elif verdict.units and not verdict.missing:
        now = VALIDATED_UNITS.get(device)
        same = "as the table has it" if now == verdict.units else f"the table has {now}"
        lines.append(
            f"`{name}` is validated up to {verdict.units:,} units, the most that passed. In "
            f'`VALIDATED_UNITS` of `bnlstm_jax/recurrence/__init__.py` that is `"{device}": '
            f"{verdict.units},` ({same})."
        )
    elif verdict.units:
        lines.append(
            f"`{name}` is not validated yet. It passed with up to {verdict.units:,} units. Not run "
            f"to the end: {', '.join(verdict.missing)}."
        )
    else:
        lines.append(f"`{name}` is not validated.")
    lines += [f"- {problem}" for problem in verdict.problems]
    return "\n".join(lines)


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
    parts += ["## Steps", metrics.markdown_table(["step", "outcome", "seconds"], steps)]
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
    rows = [(*kind, *(str(counts[*kind, outcome]) for outcome in outcomes)) for kind in kinds]
    parts = [metrics.markdown_table(["implementation", "dtype", *outcomes], rows)]
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
    return [metrics.markdown_table(header, rows)]
