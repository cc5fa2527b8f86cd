"""Milestones: validations of committed runs of the same config, which show if a run is on track.

The runs are read from `results/runs` beside the code.
"""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.records import runs

RUNS = Path(__file__).parents[2] / "results" / "runs"
MARGIN = 0.1  # minimum, relative to the range's upper end: a few seeds underestimate the range


class Milestone(NamedTuple):
    """The range of a validation metric, with batch statistics if any, over earlier runs."""

    metric: str
    low: float
    high: float
    seeds: int

    def tell(self, value: float) -> str:
        """One line: whether `value` is on track (in the range or its margins), better, or off."""
        margin = max(self.high - self.low, MARGIN * self.high)
        better = value > self.high if self.metric == "accuracy" else value < self.low
        on_track = self.low - margin <= value <= self.high + margin
        verdict = "on track" if on_track else "better" if better else "off track"
        return (
            f"{verdict}: {self.metric} {value:.3f}, in earlier runs {self.low:.3f} to "
            f"{self.high:.3f} (seeds: {self.seeds})"
        )


def of(config: ConfigDict) -> dict[int, Milestone]:
    """Milestones by update: the 1st, 2nd, 4th, 8th, ... validation that all earlier runs have."""
    fields = runs.identity(config)
    same = [run for run in runs.find(RUNS) if runs.identity(run.config) == fields]
    metric = "error" if config.task == "question_answering" else "accuracy"
    curves = [dict(run.curve("valid", metric).T.tolist()) for run in same]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    milestones = {}
    for doubling in range(len(shared).bit_length()):
        update = shared[2**doubling - 1]
        values = [curve[update] for curve in curves]
        milestones[int(update)] = Milestone(metric, min(values), max(values), len(values))
    return milestones
