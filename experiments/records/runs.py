"""Finished runs, and runs in progress, read from their files."""

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments import tasks
from experiments.records import results_file, workdir
from experiments.records.checkpoints import read_best
from experiments.records.metrics import read_metrics
from experiments.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config, one kind of model, and changed fields: all that describes a run except its seed.

    Attributes:
      config: a file in `configs`, with its variant if any: `ptb` or `ptb:small`.
      kind: the kind of model.
      fields: fields that differ from the file, as pairs of name and value.
      num_updates: how many updates the paper shows, if not as many as in the file.
    """

    config: str
    kind: str
    fields: tuple[tuple[str, Any], ...] = ()
    num_updates: int | None = None

    def __str__(self) -> str:
        """The name of a folder: `pmnist/bn_lstm` or `pmnist/bn_lstm,initial_scale=0.3`."""
        fields = "".join(f",{name.split('.')[-1]}={value}" for name, value in self.fields)
        return f"{self.config.replace(':', '_')}/{self.kind}{fields}"

    def get_config(self) -> ConfigDict:
        """The whole config, with as many updates as the paper shows."""
        name, _, variant = self.config.partition(":")
        module = importlib.import_module(f"configs.{name}")
        config = module.get_config(variant) if variant else module.get_config()
        config.update_from_flattened_dict({**dict(self.fields), "model.kind": self.kind})
        config.num_updates = self.num_updates or config.num_updates
        return config

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        return identity(self.get_config())

    def is_of(self, config: ConfigDict) -> bool:
        """Whether a config is this experiment's, except for fields in which its runs may differ."""
        return self._identity == identity(config)


def identity(config: ConfigDict) -> dict[str, Any]:
    """The fields that runs of one experiment share, with JSON's types.

    Such runs may differ in the seed and in `workdir.FREE_FIELDS`.
    """
    flat = workdir.flat(config)
    free = ("seed", *workdir.FREE_FIELDS)
    return {name: value for name, value in flat.items() if name not in free}


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The config of its latest start."""
        return workdir.read_config(self.folder)

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """Its `run.json`."""
        return workdir.read_record(self.folder)

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """Its `results.json`; empty before its first final evaluation."""
        return results_file.read(self.folder)

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Its metrics, oldest first."""
        return read_metrics(self.folder)

    @property
    def updates(self) -> int:
        """The last update of its latest start; if unknown, the last with metrics or results."""
        ended = self.record["starts"][-1].get("until")
        if ended is not None:
            return ended
        logged = self.rows[-1]["update"] if self.rows else 0
        return max(logged, self.results.get("updates", 0))

    @property
    def is_evaluated(self) -> bool:
        """Whether its results are of its last update; in a run in progress they may be older."""
        return self.results.get("updates") == self.updates

    @property
    def seconds(self) -> int | None:
        """The seconds of all its starts; None if one of them was killed or is in progress."""
        seconds = [start.get("seconds") for start in self.record["starts"]]
        return None if None in seconds else sum(seconds)

    @property
    def implementations(self) -> list[str]:
        """The implementations of the recurrence in its starts; early versions record none."""
        return sorted({name for s in self.record["starts"] if (name := s.get("implementation"))})

    def curve(self, split: str, metric: str) -> np.ndarray:
        """A metric by update, `[2, points]`: update and value, with batch statistics if any."""
        rows = [row for row in self.rows if row["split"] == split and metric in row]
        points = [(row["update"], row[metric]) for row in rows]
        return np.array(points, float).reshape(-1, 2).T

    def curve_by_hours(self, split: str, metric: str) -> np.ndarray:
        """As `curve`, by hours of the run; no points if its `seconds` are unknown.

        Hours are updates times the run's mean time of an update, which includes validation.
        """
        points = self.curve(split, metric)
        if not self.seconds or not self.updates:
            return points[:, :0]
        return points * [[self.seconds / self.updates / 3600], [1]]


class Trained(NamedTuple):
    """The best model of a run so far, and its task.

    Attributes:
      config: of the run.
      task: the run's task, with its data.
      model: maps `(*task.inputs(batch), use_running_average)` to outputs.
      variables: parameters, and statistics if the model has any.
      update: the update whose checkpoint it is.
      statistics: the kind of statistics: `population`, re-estimated; `running`, before
        re-estimation; or `none`.
    """

    config: ConfigDict
    task: tasks.Task
    model: nn.Module
    variables: dict[str, Any]
    update: int
    statistics: str


def load(folder: Path | str, data_dir: str | None = None) -> Trained:
    """The best model so far of the run in `folder`.

    `data_dir` is the folder of the data, by default that of the run.

    Raises:
      UserError: there is no run or no validated checkpoint, the checkpoint is damaged, or the data
        are missing or differ from the run's.
    """
    folder = Path(folder)
    config = workdir.read_config(folder)
    config.data_dir = data_dir or config.data_dir
    config.model.implementation = "auto"  # the run's may be for another device
    update, variables, statistics = read_best(folder)
    task = tasks.load(config)
    workdir.check_record(task.record, folder)
    return Trained(config, task, task.model, variables, update, statistics)


def find(root: Path) -> list[Run]:
    """All runs in a folder and its subfolders, sorted by path.

    A run with a file that cannot be read is left out, with a warning that names the file.
    """
    found = []
    for path in sorted(root.rglob("config.json")):
        run = Run(path.parent)
        try:
            run.config, run.record, run.results  # noqa: B018
            found.append(run)
        except (UserError, OSError) as error:
            logging.warning("%s; this run is left out", error)
    return found


def of(experiment: Experiment, runs: list[Run]) -> list[Run]:
    """The runs of an experiment, by seed; of two with the same seed, the one with more updates."""
    best: dict[int, Run] = {}
    for run in runs:
        if experiment.is_of(run.config):
            seed = run.config.seed
            if seed not in best or best[seed].updates < run.updates:
                best[seed] = run
    return [best[seed] for seed in sorted(best)]
