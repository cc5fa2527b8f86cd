"""Writes the folders of made-up runs, without training."""

import json
from pathlib import Path

from experiments.launching.sweeps import Point
from experiments.records import results_file
from experiments.records.runs import Experiment
from experiments.runtime import files

# A valid workdir name with special characters of Matplotlib, Rich, glob, Markdown and HTML.
ODD = "_a $x_1$ *|? ~~b~~ `c` :heart: <i>&amp; 'd\" e"


def results_of(point: Point, updates: int | None = None) -> dict[str, object]:
    """The fields of `results.json` that mark a point's run as finished."""
    config = point.config
    updates = updates or config.num_updates
    return {"updates": updates, "evaluation": results_file.evaluation_fields(config)}


def write_run(
    folder: Path,
    experiment: Experiment,
    seed: int = 1,
    validations: dict[int, dict[str, float]] | None = None,
    test: dict[str, float] | None = None,
    **start: object,
) -> Path:
    """Writes a run with `validations` by update, finished if it has results on the `test` set."""
    run = folder / str(experiment) / f"seed_{seed}"
    run.mkdir(parents=True)
    config = experiment.get_config()
    validations = validations or {}
    config.seed, config.num_updates = seed, max(validations, default=1)
    files.write_json(run / "config.json", json.loads(config.to_json_best_effort()))
    start = {
        "command": f"python -m experiments.main --workdir={run}",
        "started": "2026-11-23T05:00:00+00:00",
        "commit": "0123456789abcdef",
        "devices": ["cpu"],
        "machine": "x86_64, 2 cores",
        **start,
    }
    if test is not None:
        start |= {"until": config.num_updates, "seconds": 3900}
    files.write_json(run / "run.json", {"starts": [start]})
    rows = [
        {"update": update, "split": split, "statistics": "batch", **values}
        for update, values in validations.items()
        for split in ("train", "valid")
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if test is not None:
        statistics = "none" if experiment.kind == "lstm" else "population"
        row = {"split": "test", "statistics": statistics, **test}
        others = [
            {"split": "test", "statistics": "batch", **{name: -1.0 for name in test}},
            {"split": "valid", "statistics": statistics, **{name: -1.0 for name in test}},
        ]
        update = config.num_updates
        evaluation = results_file.evaluation_fields(config)
        rows = [*others, row]
        results = {"update": update, "updates": update, "evaluation": evaluation, "rows": rows}
        files.write_json(run / "results.json", results)
    return run
