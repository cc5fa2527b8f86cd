"""Is this run healthy? Validations of runs that were, to hold a new one against.

`milestones.json` has them, by config and kind of model; scripts/milestones.py makes it of runs.
They are for configs as they are: where any other field is set, there is nothing to compare with.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.records import runs

PATH = Path(__file__).with_suffix(".json")
MARGIN = 0.05  # of the value, at least, to both sides of what few seeds gave


class Milestone(NamedTuple):
    """What healthy runs had after some updates.

    Attributes:
      metric: of validation, with batch statistics if any.
      low, high: over `seeds` runs.
      paper: what the paper's curve has there; None where it has none.
    """

    metric: str
    low: float
    high: float
    seeds: int
    paper: float | None

    def tell(self, value: float) -> str:
        """Whether a value is as it should be, in a line.

        It may lie beyond those of a few seeds by as much as they lie apart, or by a twentieth.
        """
        values = [self.low, self.high, *([] if self.paper is None else [self.paper])]
        low, high = min(values), max(values)
        margin = max(high - low, MARGIN * high)
        least, most = low - margin, high + margin
        better = value > most if self.metric == "accuracy" else value < least
        verdict = "on track" if least <= value <= most else "better" if better else "off"
        paper = "" if self.paper is None else f", the paper {self.paper:.3f}"
        return (
            f"{verdict}: {self.metric.replace('_', ' ')} {value:.3f}, where {self.seeds} runs had "
            f"{self.low:.3f} to {self.high:.3f}{paper}"
        )


def of(config: ConfigDict) -> dict[int, Milestone]:
    """The milestones of a run, by update; none if its config is not one that has some."""
    for known in _known():
        if runs.Experiment(known["config"], known["kind"]).is_of(config):
            return {
                point["update"]: Milestone(
                    known["metric"], *(point[name] for name in ("low", "high", "seeds", "paper"))
                )
                for point in known["points"]
            }
    return {}


@functools.cache
def _known() -> list[dict[str, Any]]:
    return json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else []
