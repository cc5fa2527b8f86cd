"""Sweeps: runs of one config that differ in a few fields.

The function `get_sweep()` of a sweep file returns a list of points, each a `{config field: value}`:

    def get_sweep():
        return product(values("model.initial_scale", 0.1, 0.3), values("seed", 1, 2, 3))
"""

import hashlib
import itertools
import re
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from experiments import config as shared
from experiments import parallel, tasks
from experiments.records import results_file, workdir
from experiments.runtime.errors import UserError, unknown_name

Fields = dict[str, Any]  # values by the names of config fields, as in `model.features`

NAME_LENGTH = 150  # file systems allow 255 bytes


def values(field: str, *given: Any) -> list[Fields]:
    """A point for each value of a field."""
    if not given:
        raise UserError(f"values({field!r}) is empty: give at least one value")
    return [{field: value} for value in given]


def product(*lists: list[Fields]) -> list[Fields]:
    """All combinations of the points of several lists; the last list varies fastest."""
    return [_joined(points) for points in itertools.product(*lists)]


def zipped(*lists: list[Fields]) -> list[Fields]:
    """Joins the first points of all lists, the second ones, and so on."""
    lengths = [len(points) for points in lists]
    if len(set(lengths)) > 1:
        raise UserError(
            f"zipped(...) has lists of {', '.join(map(str, lengths))} points: they must have the "
            "same length"
        )
    return [_joined(points) for points in zip(*lists, strict=True)]


def _joined(points: Iterable[Fields]) -> Fields:
    joined: Fields = {}
    for point in points:
        for field in point.keys() & joined.keys():
            raise UserError(f"a sweep sets {field} twice in one point: remove one value")
        joined |= point
    return joined


def load(file: str) -> list[Fields]:
    """Runs a sweep file and returns its points.

    Raises:
      UserError: the file is missing, or does not return distinct points.
    """
    if not Path(file).is_file():
        others = map(str, Path("configs/sweeps").glob("*.py"))
        raise UserError(unknown_name("--sweep", file, others))
    get_sweep = runpy.run_path(file).get("get_sweep")
    if get_sweep is None:
        raise UserError(f"--sweep={file} has no function get_sweep(): add one that returns points")
    points = get_sweep()
    if not (isinstance(points, list) and points and all(map(_is_point, points))):
        raise UserError(
            f"--sweep={file}: get_sweep() must return a non-empty list of non-empty dicts "
            "{config field: value}"
        )
    points = [{field: plain(value) for field, value in point.items()} for point in points]
    for number, point in enumerate(points):
        if point in points[:number]:
            raise UserError(f"--sweep={file} has the same point twice: {point}")
    return points


def _is_point(point: Any) -> bool:
    return isinstance(point, dict) and point and all(isinstance(field, str) for field in point)


def plain(value: Any) -> Any:
    """Converts NumPy's scalars to Python's, and its arrays to tuples.

    `np.float32(0.1)` becomes 0.1, not 0.10000000149.
    """
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = tuple(np.atleast_1d(value))
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def argument(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def name(point: Fields, swept: Iterable[str]) -> str:
    """The name of a point and of its folder: `initial_scale=0.1,normalize=input+cell,seed=2`.

    It depends only on the point and the `swept` fields. Fields appear by their last name if that
    is unique among the swept ones. Characters that a file system may refuse or confuse are
    replaced; a hash then keeps names distinct.
    """
    last = [field.rpartition(".")[2] for field in swept]
    parts = []
    for field, value in point.items():
        short = field.rpartition(".")[2]
        several = isinstance(value, tuple)
        items = [argument(item) for item in value] if several else [argument(value)]
        text = "+".join(items)
        plain = re.sub(r"[^a-z0-9.+-]", "_", text)
        if plain != text or not text or (several and any("+" in item for item in items)):
            plain = f"{plain}~{_hash(argument(value))}"
        parts.append(f"{short if last.count(short) == 1 else field}={plain}")
    whole = ",".join(parts)
    return whole if len(whole) <= NAME_LENGTH else f"{whole[:NAME_LENGTH]}~{_hash(whole)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Point(NamedTuple):
    """A point of a sweep: a run, or one for each kind of model if the config names several.

    Attributes:
      name: name of the point, and of its folder.
      fields: values of all swept fields.
      config: the whole config.
      folder: `--workdir` of the point's command.
      runs: workdirs by kind of model: `folder`, or its subfolders for several kinds.
    """

    name: str
    fields: Fields
    config: ConfigDict
    folder: Path
    runs: dict[str, Path]

    def results(self, kind: str) -> dict[str, Any] | None:
        """Results of the run of a kind of model; None if it has not finished."""
        return results_file.read_finished(self.runs[kind], self.config, self.config.num_updates)

    def finished(self) -> bool:
        """Whether all runs have finished."""
        return all(self.results(kind) is not None for kind in self.runs)


def make_points(base: ConfigDict, swept: list[Fields], folder: Path) -> list[Point]:
    """Makes and checks the points of a sweep of the config `base`, with workdirs in `folder`.

    Raises:
      UserError: a point sets an unknown field or an invalid value, equals another point, or its
        workdir holds another run; or points differ in `selection`, by which they are ranked.
    """
    names = list(dict.fromkeys(field for point in swept for field in point))
    configs = [_with(base, given) for given in swept]
    if len({config.get("selection") for config in configs}) > 1:
        raise UserError("points differ in selection, which ranks them: make a sweep for each value")
    points: list[Point] = []
    for given, config in zip(swept, configs, strict=True):
        flat = flatten_dict(config.to_dict(), sep=".")
        own = name({field: flat[field] for field in given}, names)
        fields = {field: flat[field] for field in names}
        for other in points:
            if other.fields == fields:
                raise UserError(f"points {other.name} and {own} are the same run: remove one")
        try:
            runs = check_run(config, folder / own)
        except UserError as error:
            raise UserError(f"{own}: {error}") from error
        points.append(Point(own, fields, config, folder / own, runs))
    return points


def check_run(config: ConfigDict, folder: Path, processes: int = 1) -> dict[str, Path]:
    """Makes the checks of a run with `processes` processes that need no data.

    Returns:
      The workdirs of its runs by kind of model.

    Raises:
      UserError: the config or a workdir is invalid.
    """
    shared.check(config)
    parallel.check(config, processes)
    tasks.module(config).check(config)
    runs = workdir.of_kinds(config, folder)
    for own, run in runs.values():
        workdir.check(own, run)
    return {kind: run for kind, (_, run) in runs.items()}


def _with(base: ConfigDict, point: Fields) -> ConfigDict:
    """A copy of a config with the fields of a point."""
    made = base.copy_and_resolve_references()
    known = flatten_dict(base.to_dict(), sep=".")
    for field, value in point.items():
        if field == "task":
            raise UserError("a sweep cannot set config.task: use a config file of that task")
        if field not in known:
            raise UserError(unknown_name("a field of the sweep", field, known))
        kind = type(known[field])
        # A ConfigDict would accept None, and convert booleans to numbers.
        wrong = value is None or (isinstance(value, bool) and kind is not bool)
        try:
            if not wrong:
                made.update_from_flattened_dict({field: value})
        except TypeError:
            wrong = True
        if wrong:
            expected = f"it must be of type {kind.__name__}"
            raise UserError(f"config.{field} is {value!r} in the sweep: {expected}")
    return made
