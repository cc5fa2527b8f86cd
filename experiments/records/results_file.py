"""The file `results.json` of a run: results of the final evaluation of its best checkpoint."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.records import workdir
from experiments.runtime import files

NAME = "results.json"


def read(folder: Path) -> dict[str, Any]:
    """The results of the run in `folder`; empty before its first final evaluation."""
    path = folder / NAME
    return files.read_json(path) if path.exists() else {}


def read_finished(folder: Path, config: ConfigDict, updates: int) -> dict[str, Any] | None:
    """The results if they are of `updates` updates and of `config`'s evaluation fields, or None."""
    results = read(folder)
    evaluation = evaluation_fields(config)
    if (results.get("updates"), results.get("evaluation")) != (updates, evaluation):
        return None
    return results


def write(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Replaces the file, but keeps its rows of the same model for readings not evaluated now.

    Rows with batch statistics stay only if `eval_batch_size` is the same.

    Returns:
      The new content.
    """
    earlier = read(folder)
    if _evaluated_model(earlier) == _evaluated_model(results):
        known = {_row_key(row) for row in results["rows"]}
        sizes = {each["evaluation"].get("eval_batch_size") for each in (earlier, results)}
        others = [
            row
            for row in earlier["rows"]
            if _row_key(row) not in known and (len(sizes) == 1 or row["statistics"] != "batch")
        ]
        results = {**results, "rows": [*results["rows"], *others]}
    files.write_json(folder / NAME, results)
    return results


def evaluation_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields on which the final evaluation depends, with JSON's types."""
    fields = json.loads(config.to_json_best_effort())
    return {name: fields[name] for name in workdir.EVALUATION_FIELDS if name in fields}


def _evaluated_model(results: dict[str, Any]) -> tuple[Any, ...]:
    """The update of a checkpoint, and the fields on which its population statistics depend."""
    fields = results.get("evaluation", {})
    return results.get("update"), *map(fields.get, workdir.POPULATION_FIELDS)


def _row_key(row: dict[str, Any]) -> tuple[str, ...]:
    """What distinguishes a row of final results from the others."""
    return row["split"], row["statistics"], row.get("reading", "")
