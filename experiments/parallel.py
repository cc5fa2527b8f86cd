"""Data parallelism: every device computes its share of each batch, and all apply the same update.

Devices form a mesh of groups. The devices of a group share batch statistics; all devices sum their
gradients. Only batches are split. If a batch cannot be split evenly, such as the short last one of
an epoch, every device computes all of it.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.config import check_rows
from experiments.runtime.errors import UserError

AXES = ("group", "member")
STATISTICS_AXIS = "member"
REPLICATED, BY_ROWS = PartitionSpec(), PartitionSpec(AXES)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that share batches; without a mesh, the single default device.

    Attributes:
      mesh: the devices, `[groups, members]`.
    """

    mesh: Mesh | None = None

    def __str__(self) -> str:
        """`cpu`, or `8 x NVIDIA H200, in 2 processes, batch statistics over 4 each`."""
        kind = jax.devices()[0].device_kind
        if self.mesh is None:
            return kind
        several = f", in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        groups, members = self.mesh.devices.shape
        apart = f", batch statistics over {members} each" if groups > 1 else ""
        return f"{self.size} x {kind}{several}{apart}"

    @property
    def size(self) -> int:
        """Number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def statistics_axis(self) -> str | None:
        """The mapped axis over which models pool batch statistics; None without a mesh."""
        return None if self.mesh is None else STATISTICS_AXIS

    def statistics_rows(self, batch_size: int) -> int | None:
        """Number of rows that share batch statistics; None for all rows of a batch."""
        groups = 1 if self.mesh is None else self.mesh.shape["group"]
        return None if groups == 1 else batch_size // groups

    def in_one_group(self) -> "Devices":
        """The same devices in one group, which shares batch statistics."""
        if self.mesh is None:
            return self
        return Devices(Mesh(self.mesh.devices.reshape(1, -1), AXES))

    def splits(self, rows: int) -> bool:
        """Whether devices split a batch of `rows` rows; otherwise each computes all of it."""
        if self.mesh is None or rows % self.size:
            return False
        return rows > self.mesh.shape["group"]  # a group needs two rows for batch statistics

    def share(self, rows: int) -> slice:
        """The rows of a batch that this process reads."""
        if jax.process_count() == 1 or not self.splits(rows):
            return slice(None)
        own = rows // jax.process_count()
        return slice(jax.process_index() * own, (jax.process_index() + 1) * own)

    def sharding(self, rows: int, shared: Collection[str] = ()) -> "BatchSharding":
        """How the devices compute a batch of `rows` rows; for `shared` see `BatchSharding`."""
        return BatchSharding(self.mesh, self.splits(rows), tuple(shared))

    def replicate(self, tree: Any) -> Any:
        """Copies arrays, which every process has, to all devices."""
        if self.mesh is None:
            return jax.tree.map(jax.device_put, tree)
        return jax.tree.map(lambda x: _put(x, self.mesh, REPLICATED), tree)


@dataclasses.dataclass(frozen=True)
class BatchSharding:
    """How devices compute one batch: each its own rows, or each all of it.

    Attributes:
      mesh: the devices; None for the default device.
      split: each device has its own rows.
      shared: entries of the batch that belong to all its rows and go to all devices.
    """

    mesh: Mesh | None = None
    split: bool = False
    shared: tuple[str, ...] = ()

    def place(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Puts this process' share of a batch on its devices."""
        if self.mesh is None:
            return batch
        return {name: _put(value, self.mesh, self._spec(name)) for name, value in batch.items()}

    def run(self, function: Callable) -> Callable:
        """Makes every device run `function(*arguments, batch)`, on its own rows if `split`.

        Arguments and results are the same on all devices. Call the returned function under `jit`.
        """
        if self.mesh is None:
            return function

        def on_devices(*arguments: Any) -> Any:
            *others, batch = arguments
            return jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(*[REPLICATED] * len(others), {name: self._spec(name) for name in batch}),
                out_specs=REPLICATED,
                # The library's own gradients sum over the axis; JAX must not sum again.
                check_vma=False,
            )(*arguments)

        return on_devices

    def _spec(self, name: str) -> PartitionSpec:
        return BY_ROWS if self.split and name not in self.shared else REPLICATED

    # ---- Within a function that every device runs.

    def total(self, tree: Any) -> Any:
        """Sums over the whole batch, from the sums over each device's rows."""
        if self.mesh is None:
            return tree
        return jax.lax.psum(tree, AXES) if self.split else jax.lax.pmean(tree, AXES)

    def mean_of_groups(self, tree: Any) -> Any:
        """The mean over groups of values that are equal within a group."""
        if self.mesh is None or self.mesh.shape["group"] == 1:
            return tree
        return jax.lax.pmean(tree, "group")

    def fold_in(self, key: jax.Array) -> jax.Array:
        """A key of this device's own if `split`, else the given key."""
        if self.mesh is None or not self.split:
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(AXES))


def _put(value: Any, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    sharding = NamedSharding(mesh, spec)
    # A text is already on the devices, perhaps with another grouping.
    if isinstance(value, jax.Array) and value.sharding.is_equivalent_to(sharding, value.ndim):
        return value
    return jax.make_array_from_process_local_data(sharding, np.asarray(value))


ONE_DEVICE = Devices()
UNSHARDED = BatchSharding()


def check(config: ConfigDict, num_processes: int = 1, num_local_devices: int | None = None) -> None:
    """Refuses more devices than there are, and batches or groups that do not divide evenly.

    Raises:
      UserError: names the field and what it may be.
    """
    own = config.parallel.devices
    if num_local_devices is not None:
        if own > num_local_devices:
            raise UserError(
                f"config.parallel.devices is {own}: it must be at most {num_local_devices}, the "
                "devices of a process here, or 0 for all of them"
            )
        own = own or num_local_devices
    elif own == 0:
        return  # the rest is checked when the devices are known
    size, members = own * num_processes, config.parallel.statistics_devices
    if config.batch_size % size:
        shared = math.gcd(size, config.batch_size)
        near = config.batch_size // size * size or size
        raise UserError(
            f"config.batch_size is {config.batch_size}: it must be divisible by the {size} devices "
            f"(config.parallel.devices), such as {near}; or use {shared} devices"
        )
    if members and size % members:
        raise UserError(
            f"config.parallel.statistics_devices is {members}: it must divide the {size} devices "
            "(config.parallel.devices), or be 0 for all of them"
        )
    if members:
        source = (
            f"config.parallel.statistics_devices is {members}, so statistics are of one example of "
            f"config.batch_size {config.batch_size}"
        )
        check_rows(config, config.batch_size * members // size, source)


def make(config: ConfigDict) -> Devices:
    """The devices that `config.parallel` asks for, of all processes.

    Raises:
      UserError: there are fewer, or batches or groups do not divide evenly.
    """
    check(config, jax.process_count(), jax.local_device_count())
    own = config.parallel.devices or jax.local_device_count()
    devices = [
        device
        for process in range(jax.process_count())
        for device in [d for d in jax.devices() if d.process_index == process][:own]
    ]
    if len(devices) == 1:
        return ONE_DEVICE
    members = config.parallel.statistics_devices or len(devices)
    return Devices(Mesh(np.array(devices).reshape(-1, members), AXES))
