"""The report of a validation, in Markdown: verdicts, and the results behind them."""

import collections
from typing import Any

from bnlstm_jax.recurrence import VALIDATED_UNITS
from experiments.runtime import markdown
from experiments.validation import rates, training
from experiments.validation.verdict import Findings, Verdict, checks, judge, kernels, medians

OUTCOMES = ("passed", "failed", "not supported")


def page(findings: Findings, steps: list[tuple[str, str, str]], command: str) -> str:
    """The report.

    Args:
      findings: the results of the steps.
      steps: name, outcome and seconds of each.
      command: the command line.
    """
    parts = []
    if findings:
        record = next(iter(findings.values()))
        commits = dict.fromkeys(str(each["commit"]) for each in findings.values())
        machine, versions = record["machine"], record["versions"]
        is_small = findings.get("check", {}).get("small", False)
        parts += [
            f"# {machine['device']}",
            f"`{command}`, commit {', '.join(commits)}, {record['date']}, JAX {versions['jax']}, "
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
        parts += ["## Rates", rates.table(findings["rates"]["rates"])]
    if "check" in findings:
        parts += ["## Checks against float64", *check_parts(findings)]
    if "benchmark" in findings:
        parts += ["## Time of an update", benchmark_table(findings["benchmark"])]
    if "training" in findings:
        record = findings["training"]
        parts += [f"## Training: {record['config']}", training.table(record["losses"])]
    return "\n\n".join(parts) + "\n"


def sentence(name: str, verdict: Verdict, device: str, is_rehearsal: bool = False) -> str:
    """A verdict in words, with its line for `VALIDATED_UNITS`."""
    if is_rehearsal:
        lines = [f"`{name}` ran with small layers: a rehearsal, which validates nothing."]
    elif not verdict.units:
        lines = [f"`{name}` is not validated."]
    elif verdict.missing:
        lines = [f"`{name}` is not validated yet. It passed with up to {verdict.units:,} units."]
    else:
        lines = [
            f"`{name}` is validated up to {verdict.units:,} units, the most that passed. "
            f"{table_line(verdict.units, device)}"
        ]
    lines += [f"- {problem}" for problem in verdict.problems]
    if verdict.missing and not is_rehearsal:
        lines.append(f"- Not run to the end: {'; '.join(verdict.missing)}.")
    return "\n".join(lines)


def table_line(units: int, device: str) -> str:
    """A sentence that compares `VALIDATED_UNITS`, which `auto` reads, with a verdict."""
    now = VALIDATED_UNITS.get(device, 0)
    if now == units:
        return "`VALIDATED_UNITS` has that value."
    if now > units:
        return f"`VALIDATED_UNITS` has a larger value: {now}."
    before = f"now {now}" if now else "not listed yet"
    line = f'`"{device}": {units},` ({before})'
    return f"Its line in `VALIDATED_UNITS` of `bnlstm_jax/recurrence/__init__.py`: {line}."


def check_parts(findings: Findings) -> list[str]:
    """Numbers of checks by implementation, dtype and outcome; then problems."""
    results = findings["check"]["results"]
    counts = collections.Counter((r["implementation"], r["dtype"], r["outcome"]) for r in results)
    rows = []
    for name, dtype in dict.fromkeys((r["implementation"], r["dtype"]) for r in results):
        passed = [r for r in checks(findings, name, "passed") if r["dtype"] == dtype]
        nearest = max(passed, key=lambda r: r["share"], default=None)
        share = f"{nearest['share']:.0%}, {nearest['case']}" if nearest else "-"
        rows.append((name, dtype, *(str(counts[name, dtype, each]) for each in OUTCOMES), share))
    header = ["implementation", "dtype", *OUTCOMES, "largest share of the allowed error"]
    failed = [
        f"- {r['implementation']}, {r['case']}, {r['dtype']}: failed: {r['problem']}"
        for r in results
        if r["outcome"] == "failed"
    ]
    refused = collections.Counter(
        (r["implementation"], r["dtype"], r["problem"])
        for r in results
        if r["outcome"] == "not supported"
    )
    reasons = [
        f"- {name}, {dtype}, not supported in {count} cases: {problem}"
        for (name, dtype, problem), count in refused.items()
    ]
    lists = ["\n".join(lines) for lines in (failed, reasons) if lines]
    return [markdown.table(header, rows), *lists]


def benchmark_table(benchmark: dict[str, Any]) -> str:
    """Milliseconds of an update: a row for each candidate, a column for each size and dtype."""
    results = [r for r in benchmark["results"] if r["pass"] == "update"]
    times = [medians(result) for result in results]
    rows = [
        (name, *(f"{1e3 * column[name]:.1f}" if name in column else "-" for column in times))
        for name in dict.fromkeys(name for column in times for name in column)
    ]
    return markdown.table(["ms", *(f"{r['size']}, {r['dtype']}" for r in results)], rows)
