"""Sweeps: many runs of one config that differ in a few of its fields.

A sweep file's `get_sweep()` returns the points, each a `{config field: value}`. It is Python, and
loading it runs it. Points are made with the functions here:

    def get_sweep():
        return product(values("model.initial_scale", 0.1, 0.3), values("seed", 1, 2, 3))
"""

import hashlib
import importlib.util
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from experiments import config as shared
from experiments.models import layers
from experiments.records import workdir
from experiments.runtime import files
from experiments.runtime.errors import UserError, unknown_name
from experiments.train import RESULTS_NAME

Fields = dict[str, Any]  # values by the names of config fields, as in `model.features`

NAME_LENGTH = 150  # file systems allow 255 bytes


def values(field: str, *given: Any) -> list[Fields]:
    """A point for each value of a field."""
    if not given:
        raise UserError(f"values({field!r}) of a sweep has no value")
    return [{field: value} for value in given]


def product(*lists: list[Fields]) -> list[Fields]:
    """Every point of one list with every point of the others; those of the first change last."""
    return [_joined(points) for points in itertools.product(*lists)]


def zipped(*lists: list[Fields]) -> list[Fields]:
    """The first points of all lists as one, the second ones, and so on."""
    lengths = [len(points) for points in lists]
    if len(set(lengths)) > 1:
        raise UserError(
            f"zipped(...) of a sweep has lists of {', '.join(map(str, lengths))} points: make them "
            "equally long"
        )
    return [_joined(points) for points in zip(*lists, strict=True)]


def _joined(points: Iterable[Fields]) -> Fields:
    joined: Fields = {}
    for point in points:
        for field in point.keys() & joined.keys():
            raise UserError(f"a sweep sets {field} twice in one point: leave one of them out")
        joined |= point
    return joined


def load(file: str) -> list[Fields]:
    """The points of a sweep file, which is run for that.

    Raises:
      UserError: the file is not there, or does not return points, each but once.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(
            unknown_name("--sweep", file, map(str, Path("configs/sweeps").glob("*.py")))
        )
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--sweep={file} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise UserError(f"--sweep={file} has no function get_sweep(): let it return the points")
    points = module.get_sweep()
    if not isinstance(points, list) or not all(
        isinstance(point, dict) and point and all(isinstance(field, str) for field in point)
        for point in points
    ):
        raise UserError(
            f"--sweep={file}: get_sweep() must return a list of {{config field: value}}, none of "
            "them empty"
        )
    if not points:
        raise UserError(f"--sweep={file} is empty: get_sweep() returns no point")
    points = [{field: plain(value) for field, value in point.items()} for point in points]
    for number, point in enumerate(points):
        if point in points[:number]:
            raise UserError(f"--sweep={file} has a point twice: {point}")
    return points


def plain(value: Any) -> Any:
    """A value as a config field has it: NumPy's scalars become Python's, its arrays tuples.

    A float of fewer than 64 bits becomes the one that is written alike: `np.float32(0.1)` 0.1.
    """
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = tuple(np.atleast_1d(value))
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def argument(value: Any) -> str:
    """A value as the command line gives it."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def name(point: Fields, swept: Iterable[str]) -> str:
    """A name for a point, and for its folder: `initial_scale=0.1,normalize=input+cell,seed=2`.

    It depends on nothing but the point and which fields are `swept`. Fields go by their last name
    where no other swept one shares it. What a file system may not take, or not tell apart, is
    replaced, and then a hash tells values apart.
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
    """A point, checked: a run, or one for each kind of model if the config names several.

    Attributes:
      name: of the point, and of its folder.
      fields: what is swept, by name.
      config: the whole of it.
      folder: its workdir, as it is given to `experiments.main`.
      runs: workdirs of runs, by kind of model; of several kinds they are in that folder.
    """

    name: str
    fields: Fields
    config: ConfigDict
    folder: Path
    runs: dict[str, Path]

    def results(self, kind: str) -> dict[str, Any] | None:
        """What the finished run of a kind came to; None if it is not finished."""
        path = self.runs[kind] / RESULTS_NAME
        if not path.exists():
            return None
        results = files.read_json(path)
        return results if results["updates"] == self.config.num_updates else None

    def finished(self) -> bool:
        """Whether all of its runs are."""
        return all(self.results(kind) is not None for kind in self.runs)


def make_points(base: ConfigDict, swept: list[Fields], folder: Path) -> list[Point]:
    """The points of a sweep of the config `base`, whose workdirs are in `folder`; writes nothing.

    Raises:
      UserError: a point has a field that the config has not, or a value that it cannot take, or its
        workdir holds another run.
    """
    # Of all points, in the order in which they come; a point without one has the config's value.
    names = list(dict.fromkeys(field for point in swept for field in point))
    configs = [_with(base, given) for given in swept]
    points: list[Point] = []
    for given, point_config in zip(swept, configs, strict=True):
        flat = flatten_dict(point_config.to_dict(), sep=".")
        fields = {field: flat[field] for field in names}
        own = name({field: flat[field] for field in given}, names)
        kinds = _check(own, point_config)
        runs = {kind: folder / own / kind if len(kinds) > 1 else folder / own for kind in kinds}
        for kind, run in runs.items():
            run_config = point_config.copy_and_resolve_references()
            run_config.model.kind = kind
            workdir.check(run_config, run)
        for other in points:
            if other.fields == fields:
                raise UserError(f"a sweep has one run twice, as {other.name} and as {own}")
        points.append(Point(own, fields, point_config, folder / own, runs))
    return points


def _with(base: ConfigDict, point: Fields) -> ConfigDict:
    """A copy of a config with the fields of a point."""
    made = base.copy_and_resolve_references()
    known = flatten_dict(base.to_dict(), sep=".")
    for field, value in point.items():
        if field not in known:
            raise UserError(unknown_name("a swept field", field, known))
        kind = type(known[field])
        # Which a ConfigDict would let pass, or turn into numbers.
        wrong = value is None or (isinstance(value, bool) and kind is not bool)
        try:
            if not wrong:
                made.update_from_flattened_dict({field: value})
        except TypeError:
            wrong = True
        if wrong:
            raise UserError(f"config.{field} is swept and is {value!r}: it must be {kind.__name__}")
    return made


def _check(own: str, config: ConfigDict) -> list[str]:
    """The kinds of model of a point, whose values are checked as far as they can be without data.

    Raises:
      UserError: names the point too.
    """
    try:
        shared.check(config)
        if "recurrent_init" in config.model:
            layers.check(config.model)
        return shared.model_kinds(config)
    except UserError as error:
        raise UserError(f"{own}: {error}") from error
