"""Re-estimates population statistics: the mean of batch statistics over training data.

The running averages that training keeps in `batch_stats` lag behind the parameters, and early in
training they still hold part of their initial values. For its final numbers, the paper instead
averages the statistics of batches under the final parameters, at each time step and with equal
weights.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from bnlstm_jax.batch_norm import CURRENT_BATCH_STATS, observed_updates

Path = tuple[str, ...]  # of a module, or of a variable within a collection


def estimate_population_statistics(
    model: nn.Module,
    variables: dict[str, Any],
    batches: Iterable[Any],
    *,
    rngs: dict[str, Array] | None = None,
    late_steps: str = "skip",
    inputs: Callable[[Any], Any] | None = None,
    transform: Callable[[Callable], Callable] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Re-estimates the collection `batch_stats` of a model from batches of training data.

    Example::

        stats = estimate_population_statistics(model, variables, batches, use_running_average=False)
        y = model.apply({**variables, "batch_stats": stats}, x, use_running_average=True)

    If the model's `train` flag also enables dropout, pass a key for it. The statistics are then
    those under dropout, like the running averages::

        stats = estimate_population_statistics(
            model, variables, batches, train=True, rngs={"dropout": key})

    This covers `BNLSTM`, `BatchNorm`, `BNLSTMCell` and `BNSimpleCell` anywhere in the model. Lifted
    transforms around them (`nn.scan`, `nn.vmap`, `nn.RNN`) must list the collection
    `current_batch_stats` (`bnlstm_jax.CURRENT_BATCH_STATS`) beside `batch_stats`, both along axis 0
    or both carried::

        nn.RNN(cell, variable_axes={"batch_stats": 0, "current_batch_stats": 0})

    If the model calls a module several times, the statistics of a batch are the average over these
    calls, weighted by the number of rows in each.

    Call it outside of `jit` and `vmap`: it checks values.

    Args:
      model: a `flax.linen.Module`.
      variables: the model's variables, with the parameters to estimate statistics for. The model's
        changes to other collections than `batch_stats` are discarded.
      batches: training data. Each batch is the model's argument, or a tuple of all its positional
        arguments, without labels; see `inputs`.
      rngs: keys of the model's rng streams, folded with the index of the batch.
      late_steps: what a batch of shorter sequences contributes to time steps that it does not
        reach: `skip`, nothing; `repeat`, the statistics of its last step, as in the paper's
        released Attentive Reader.
      inputs: maps a batch to the model's argument or tuple of arguments. For batches
        `(x, labels)`, use `lambda batch: batch[0]`. Calls with the same model, functions and
        options share a compiled program, so define `inputs` and `transform` outside of loops. The
        last four programs stay in memory, with what they were compiled for.
      transform: transforms the function that is called for each batch, with the arguments
        variables, `rngs`, index of the batch, batch; by default `jax.jit`. For a model with an
        `axis_name`, it must also map that axis over the batch. The results are equal along the
        axis, hence `out_axes=None`::

            lambda f: jax.jit(jax.vmap(f, (None, None, None, 0), out_axes=None, axis_name="batch"))
      **kwargs: keyword arguments of the model, one of which selects batch statistics, such as
        `use_running_average=False`.

    Returns:
      `batch_stats`, with every statistic of those modules, `[..., T, F]` or `[..., F]`, replaced by
      its average over the batches that reach its time step. Steps that no batch reaches get the
      statistics of the last step that a batch reaches. Statistics that no batch reaches at any step
      stay as they are.

    Raises:
      TypeError: `model` is not a `flax.linen.Module`, `variables` or `rngs` is not a dict, or a
        batch is a list.
      ValueError: there are no batches, no module used batch statistics, a lifted transform does not
        list `current_batch_stats`, or `late_steps` is unknown.

    Warns:
      UserWarning: another module, such as `flax.linen.BatchNorm`, updates statistics in
        `batch_stats`. These stay as they are.
    """
    if late_steps not in ("skip", "repeat"):
        raise ValueError(f"late_steps: expected 'skip' or 'repeat', got {late_steps!r}")
    _check_model(model)
    if not isinstance(variables, Mapping):
        got = type(variables).__name__
        raise TypeError(f"variables: expected {{'params': ..., 'batch_stats': ...}}, got {got}")
    if rngs is not None and not isinstance(rngs, Mapping):
        got = type(rngs).__name__
        raise TypeError(f"rngs: expected a dict of keys, such as {{'dropout': key}}, got {got}")
    statistics = flatten_dict(variables.get("batch_stats", {}))
    options = _Options(model, inputs, late_steps, tuple(sorted(kwargs.items())))
    contribution = _compiled(options, transform or jax.jit)
    sums: dict[Path, _Sum] = {}
    unlifted: frozenset[Path] = frozenset()
    timeless: frozenset[Path] = frozenset()
    for index, batch in enumerate(batches):
        of_batch = contribution(variables, dict(rngs or {}), index, batch)
        sums = jax.tree.map(jnp.add, sums, of_batch.sums) if sums else of_batch.sums
        unlifted |= of_batch.unlifted
        timeless |= of_batch.timeless
    averaged = {path for path, (_, weight, _) in sums.items() if jnp.any(weight > 0)}
    _check(sums, averaged, unlifted)
    for path in averaged:
        total, weight, _ = sums[path]
        average, reached = total / jnp.maximum(weight, 1), weight > 0
        if path not in timeless:
            average, reached = _repeat_last(average, reached)
        old = nn.unbox(statistics[path])
        average = jnp.where(reached, average.astype(old.dtype), old)
        statistics[path] = nn.meta.replace_boxed(statistics[path], average)
    return unflatten_dict(statistics)


class _Sum(NamedTuple):
    """A statistic, summed over batches.

    Attributes:
      total: sum over the batches that reach it, `[..., F]`.
      weight: number of those batches, `[..., 1]`, in the dtype of the statistic.
      moved: boolean `[]`; whether any batch changed its running average.
    """

    total: Array
    weight: Array
    moved: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Contribution:
    """What a batch adds to the estimate.

    Attributes:
      sums: what it adds to the sum of every statistic.
      unlifted: the modules that could not write `current_batch_stats`; known at trace time.
      timeless: the statistics without a time axis, also known then. In `batch_stats` they may have
        other axes, of lifted transforms.
    """

    sums: dict[Path, _Sum]
    unlifted: frozenset[Path] = dataclasses.field(metadata={"static": True})
    timeless: frozenset[Path] = dataclasses.field(metadata={"static": True})


class _Options(NamedTuple):
    """Arguments of `estimate_population_statistics` that a program is compiled for."""

    model: nn.Module
    inputs: Callable[[Any], Any] | None
    late_steps: str
    kwargs: tuple[tuple[str, Any], ...]


def _contribution(
    options: _Options, variables: Any, rngs: dict[str, Array], index: int, batch: Any
) -> _Contribution:
    """Calls the model on the batch with index `index`."""
    arguments = batch if options.inputs is None else options.inputs(batch)
    if isinstance(arguments, list):
        raise TypeError("batches: expected an argument of the model or a tuple, got a list")
    if not isinstance(arguments, tuple):
        arguments = (arguments,)
    keys = {name: jax.random.fold_in(key, index) for name, key in rngs.items()}
    before = flatten_dict(nn.unbox(variables.get("batch_stats", {})))
    variables = {**variables, CURRENT_BATCH_STATS: _no_calls(before)}
    with observed_updates() as updates:
        _, after = options.model.apply(
            variables, *arguments, rngs=keys, mutable=DenyList("params"), **dict(options.kwargs)
        )
    names = "batch_stats", CURRENT_BATCH_STATS
    updated, current = (flatten_dict(nn.unbox(after.get(name, {}))) for name in names)
    unlifted = frozenset(update.path[:-1] for update in updates if not update.lifted)
    timeless = frozenset(update.path for update in updates if update.timeless)
    repeat = options.late_steps == "repeat"
    sums = _sums(before, updated, current, repeat, timeless)
    return _Contribution(sums, unlifted, timeless)


@functools.lru_cache(maxsize=4)
def _compiled_for(options: _Options, transform: Callable) -> Callable[..., _Contribution]:
    return transform(functools.partial(_contribution, options))


def _compiled(options: _Options, transform: Callable) -> Callable[..., _Contribution]:
    """`_contribution`, transformed; equal arguments share one function if they are hashable."""
    try:
        hash((options, transform))
    except TypeError:
        return _compiled_for.__wrapped__(options, transform)
    return _compiled_for(options, transform)


def _count_path(path: Path) -> Path | None:
    """Path of the number of rows behind a mean or variance; None for other variables."""
    name, is_statistic = re.subn("(mean|var)$", "count", path[-1])
    return (*path[:-1], name) if is_statistic else None


def _no_calls(statistics: dict[Path, Array]) -> dict[str, Any]:
    """The collection `current_batch_stats` before any call: zeros.

    A transform that carries the collection needs it from the start.
    """
    current = {}
    for path, value in statistics.items():
        count_path = _count_path(path)
        if count_path is not None:
            current[path] = jnp.zeros_like(value)
            current[count_path] = jnp.zeros(value.shape[:-1], int)
    return unflatten_dict(current)


def _sums(
    before: dict[Path, Array],
    after: dict[Path, Array],
    current: dict[Path, Array],
    repeat: bool,
    timeless: frozenset[Path],
) -> dict[Path, _Sum]:
    """What a batch adds to the sum of every statistic.

    Args:
      before, after: `batch_stats` before and after the call of the model.
      current: the collection `current_batch_stats` after it.
      repeat: whether the last step that the batch reaches also counts for later ones.
      timeless: the statistics without a time axis.
    """
    sums = {}
    for path, old in before.items():
        moved = ~jnp.array_equal(old, after[path], equal_nan=True)
        count_path = _count_path(path)
        if count_path is None:
            sums[path] = _Sum(jnp.zeros_like(old), jnp.zeros((1,) * old.ndim, old.dtype), moved)
            continue
        value, reached = current[path], (current[count_path] > 0)[..., None]
        if repeat and path not in timeless:
            value, reached = _repeat_last(value, reached)
        total = jnp.where(reached, value, jnp.zeros_like(value))
        sums[path] = _Sum(total, reached.astype(value.dtype), moved)
    return sums


def _repeat_last(statistic: Array, reached: Array) -> tuple[Array, Array]:
    """Fills each time step that is not `reached` with the last reached step before it.

    Args:
      statistic: `[..., T, F]`. A cell's `[F]`, of all time steps together, is returned as it is.
      reached: boolean `[..., T, 1]` or `[1]`.

    Returns:
      The filled statistic, and a boolean `[..., T, 1]`: whether any step is reached.
    """
    if statistic.ndim < 2:
        return statistic, reached
    step = jax.lax.broadcasted_iota(jnp.int32, reached.shape, reached.ndim - 2)
    source = jax.lax.cummax(jnp.where(reached, step, jnp.zeros_like(step)), axis=reached.ndim - 2)
    anywhere = jnp.broadcast_to(jnp.any(reached, axis=-2, keepdims=True), reached.shape)
    return jnp.take_along_axis(statistic, source, axis=-2), anywhere


def _check_model(model: Any) -> None:
    """Raises a TypeError if `model` is not a Linen module."""
    if isinstance(model, nn.Module):
        return
    hint = ""
    if hasattr(model, "to_nnx__module"):
        hint = (
            "; pass model.to_nnx__module, with the variables "
            "{'params': nnx.to_pure_dict(nnx.state(model, nnx.Param)), "
            "'batch_stats': nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))}, "
            "and write the result back by nnx.update(model, stats)"
        )
    name = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise TypeError(f"model: expected an instance of flax.linen.Module, got {name}{hint}")


def _check(sums: dict[Path, _Sum], averaged: set[Path], unlifted: frozenset[Path]) -> None:
    """Raises or warns if statistics were updated, but those of the batches are unknown."""
    if missing := unlifted - {path[:-1] for path in averaged}:
        raise ValueError(
            f"{_texts(missing)}: a lifted transform (nn.scan, nn.vmap, nn.RNN) does not "
            f"return the statistics of the batch; add {CURRENT_BATCH_STATS!r}: 0 to its "
            f"variable_axes, or {CURRENT_BATCH_STATS!r} to its variable_carry if that has "
            "'batch_stats'"
        )
    left = {path[:-1] for path in sums.keys() - averaged if sums[path].moved}
    if left:
        warnings.warn(
            f"{_texts(left)}: statistics not re-estimated, because these modules are not from "
            "bnlstm_jax; they keep the values in variables",
            UserWarning,
            stacklevel=3,
        )
    if not averaged:
        raise ValueError(
            "no batch statistics to average: expected at least one batch with valid rows, a model "
            "with statistics, variables with the collection 'batch_stats', and an argument such as "
            "use_running_average=False"
        )


def _texts(paths: Iterable[Path]) -> str:
    """Paths as in Flax's errors."""
    return ", ".join("/" + "/".join(path) for path in sorted(paths))
