"""Data parallelism: every device computes its share of each batch, and all do the same update.

Devices form a mesh of groups. Those of a group take batch statistics together, and all add up their
gradients. Nothing but batches is split, and a batch that devices cannot share evenly, such as the
short last one of an epoch, is computed whole by each of them.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.config import check_rows
from experiments.runtime.errors import UserError

AXES = ("group", "member")
STATISTICS_AXIS = "member"
EVERYWHERE, BY_ROWS = PartitionSpec(), PartitionSpec(AXES)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Devices that share the work; without a mesh, the one there is.

    Attributes:
      mesh: the devices, `[groups, members]`.
    """

    mesh: Mesh | None = None

    def __str__(self) -> str:
        """`cpu`, or `8 x NVIDIA H200, in 2 processes, batch statistics of 4 each`."""
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
        """The mapped axis over which models take batch statistics, if any."""
        return None if self.mesh is None else STATISTICS_AXIS

    def in_one_group(self) -> "Parallel":
        """The same devices, taking batch statistics all together."""
        if self.mesh is None:
            return self
        return Parallel(Mesh(self.mesh.devices.reshape(1, -1), AXES))

    # ---- Batches and state, from the host to the devices.

    def splits(self, rows: int) -> bool:
        """Whether devices share a batch of so many rows, rather than computing it whole each."""
        if self.mesh is None or rows % self.size:
            return False
        return rows > self.mesh.shape["group"]  # one row has no batch statistics

    def share(self, rows: int) -> slice:
        """Which rows of a batch this process is to read."""
        if jax.process_count() == 1 or not self.splits(rows):
            return slice(None)
        own = rows // jax.process_count()
        return slice(jax.process_index() * own, (jax.process_index() + 1) * own)

    def place(self, batch: Any, split: bool, shared: Collection[str] = ()) -> Any:
        """Puts this process' share of a batch, a dictionary, on its devices.

        `shared` names what belongs to all rows, and is on all devices.
        """
        if self.mesh is None:
            return batch
        return {
            name: self._put(value, BY_ROWS if split and name not in shared else EVERYWHERE)
            for name, value in batch.items()
        }

    def replicate(self, tree: Any) -> Any:
        """Puts arrays that every process has on all devices."""
        if self.mesh is None:
            return jax.tree.map(jax.device_put, tree)
        return jax.tree.map(lambda x: self._put(x, EVERYWHERE), tree)

    def _put(self, value: Any, spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(self.mesh, spec)
        if isinstance(value, jax.Array) and value.sharding == sharding:
            return value  # a text, which has been put there once
        return jax.make_array_from_process_local_data(sharding, np.asarray(value))

    # ---- Within a function that every device runs.

    def run(self, function: Callable, split: bool, shared: Collection[str] = ()) -> Callable:
        """`function(*arguments, batch)` as every device runs it, on its rows if `split`.

        Arguments and results are the same on all devices. To be called under `jit`.
        """
        if self.mesh is None:
            return function

        def spread(*arguments: Any) -> Any:
            *others, batch = arguments
            specs = {
                name: BY_ROWS if split and name not in shared else EVERYWHERE for name in batch
            }
            return jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(*[EVERYWHERE] * len(others), specs),
                out_specs=EVERYWHERE,
                # The library's own gradients sum over the axis; JAX must not do it again.
                check_vma=False,
            )(*arguments)

        return spread

    def total(self, tree: Any, split: bool) -> Any:
        """The sum over the whole batch, of sums over a device's rows."""
        if self.mesh is None:
            return tree
        return jax.lax.psum(tree, AXES) if split else jax.lax.pmean(tree, AXES)

    def mean_of_groups(self, tree: Any) -> Any:
        """The mean over groups, of what is the same within a group."""
        if self.mesh is None or self.mesh.shape["group"] == 1:
            return tree
        return jax.lax.pmean(tree, "group")

    def fold_in(self, key: jax.Array, split: bool) -> jax.Array:
        """A key of the device's own, where devices have rows of their own."""
        if self.mesh is None or not split:
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(AXES))


ONE_DEVICE = Parallel()


def check(config: ConfigDict, num_processes: int = 1, num_local_devices: int | None = None) -> None:
    """Refuses devices that there are not, and batches or groups that they cannot share.

    Raises:
      UserError: names the field and what it may be.
    """
    own = config.parallel.devices
    if num_local_devices is not None:
        if own > num_local_devices:
            raise UserError(
                f"config.parallel.devices is {own}, and a process has {num_local_devices} here: "
                "make it at most that, or 0 for all"
            )
        own = own or num_local_devices
    elif own == 0:
        return  # the rest shows when the devices are known
    size, members = own * num_processes, config.parallel.statistics_devices
    if config.batch_size % size:
        shared = math.gcd(size, config.batch_size)
        near = config.batch_size // size * size or size
        raise UserError(
            f"config.batch_size is {config.batch_size}: it must be divisible by the {size} devices "
            f"(config.parallel.devices), as {near} is; or use {shared} of them"
        )
    if members and size % members:
        raise UserError(
            f"config.parallel.statistics_devices is {members}: it must divide the {size} devices "
            "(config.parallel.devices), or be 0 for all of them"
        )
    if members:
        source = (
            f"config.parallel.statistics_devices is {members}: of config.batch_size "
            f"{config.batch_size} they have one example"
        )
        check_rows(config, config.batch_size * members // size, source)


def make(config: ConfigDict) -> Parallel:
    """The devices that `config.parallel` asks for, of all processes.

    Raises:
      UserError: there are not as many, or they cannot share batches evenly.
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
    return Parallel(Mesh(np.array(devices).reshape(-1, members), AXES))
