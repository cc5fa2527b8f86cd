"""The processes of one job: joining it, and communication from the first process.

Only process 0 reads and writes the workdir, and prints. It sends the others what they need, so that
machines need no shared folder.
"""

import collections
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from experiments.jax_experimental import multihost_utils
from experiments.runtime.errors import UserError, report

T = TypeVar("T")

# Processes may differ in these fields: each machine has its own place for data.
OWN_FIELDS = ("config.data_dir", "config.text_file")


class JobError(UserError):
    """A user error that all processes of the job raise."""


class RunFailed(JobError):
    """A run diverged, or has no checkpoint to evaluate. Runs of other kinds of model go on."""


def is_first() -> bool:
    """Whether this is the process that reads and writes the workdir and prints."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """Calls `function` on the first process and returns its value, of JSON types, on all.

    Raises:
      UserError: `function` raised it; all processes raise it, as `JobError`.
    """
    if jax.process_count() == 1:
        return function()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said["value"] = function()
        except UserError as error:
            said["error"] = str(error)
    said = json.loads(_broadcast_text(json.dumps(said)))
    if "error" in said:
        raise JobError(said["error"])
    return said["value"]


def from_first(tree: T) -> T:
    """The arrays of the first process; in other processes, `tree` gives shapes and types only.

    JAX broadcasts by adding zeros, which turns -0.0 into 0.0.
    """
    return multihost_utils.broadcast_one_to_all(tree)


def _broadcast_text(text: str) -> str:
    """The first process' text."""
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    if not is_first():
        content = np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(content))).decode()


def check_same(values: dict[str, Any], what: str) -> None:
    """Refuses values, of JSON types, that differ between processes; `what` precedes their names.

    Raises:
      UserError: on every process. Processes that differ from process 0 name the value.
    """
    if jax.process_count() == 1:
        return
    ours = flatten_dict(json.loads(json.dumps(values)), sep=".")
    theirs = json.loads(_broadcast_text(json.dumps(ours)))
    differing = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name) and name not in OWN_FIELDS
    )
    if not np.any(multihost_utils.process_allgather(np.int32(len(differing)))):
        return
    difference = "another process differs from process 0"
    if differing:
        name = differing[0]
        here, there = (f"{v.get(name)}"[:80] for v in (ours, theirs))
        difference = (
            f"{what}{name} is {here} in process {jax.process_index()}, {there} in process 0"
        )
    raise JobError(f"{difference}; start all processes with the same flags, data and versions")


@contextlib.contextmanager
def joined(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: int,
) -> Iterator[None]:
    """Joins a job of several processes; without an address, the cluster's job.

    JAX aborts all processes if one of them is lost, or does not join within `timeout`.

    Args:
      coordinator_address: `host:port` of the first process, where it waits for the others.
      num_processes: the number of processes.
      process_id: the number of this one, from 0.
      timeout: seconds to wait for others at the start, and until a silent process counts as lost.

    Raises:
      UserError: the arguments contradict each other, there is no cluster, or processes have
        different numbers of devices.
    """
    _check(coordinator_address, num_processes, process_id)
    # The processes connect directly, even where the web needs a proxy.
    os.environ.setdefault("grpc_proxy", "")
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
        )
    except ValueError as error:
        raise UserError(
            "--distributed: JAX finds no cluster here (TPU pod, SLURM, Open MPI); use "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    try:
        _check_devices()
        yield
    except JobError:
        raise
    except Exception as error:
        # An ordinary exit would wait for the other processes, which wait for this one.
        status = report(error)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def _check_devices() -> None:
    """Refuses processes with different numbers of devices, between which JAX cannot communicate."""
    numbers = collections.Counter(device.process_index for device in jax.devices())
    for process, number in numbers.items():
        if number != numbers[0]:
            raise JobError(
                f"process {process} has {number} devices, process 0 has {numbers[0]}: start all "
                "processes with the same number of devices"
            )


def _check(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Refuses flags for which JAX would abort, or give no error."""
    if address is None:
        if (num_processes, process_id) != (None, None):
            raise UserError("--num_processes and --process_id need --coordinator_address=HOST:PORT")
        return
    if num_processes is None or process_id is None:
        raise UserError("--coordinator_address needs --num_processes and --process_id")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id}: it must be from 0 to {num_processes - 1}, below "
            "--num_processes"
        )
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(
            f"--coordinator_address is {address!r}: it must be HOST:PORT with a known host"
        ) from error
