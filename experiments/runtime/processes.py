"""The processes of one job: how they find each other, what they tell each other, how they end.

The first process, number 0, alone reads and writes the workdir, and speaks. The others hear from
it what they need, so that no folder but that of the data has to be shared between machines.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from bnlstm_jax.jax_experimental import multihost_utils
from experiments.runtime.errors import Stopped, UserError

T = TypeVar("T")

# In which processes of one job may differ: each machine has its own place for data.
OWN_FIELDS = ("config.data_dir", "config.text_file")
LOST_PEER = 75  # exit status: another process was lost, and the job may be started again
ENDED, FAILED = "ended", "failed: "  # the last words of a process, in place of its heartbeat


class Everywhere(UserError):
    """A mistake that every process of the job reports."""


class NotAll(UserError):
    """Some process did not come: the job may be started again."""

    status = LOST_PEER


def is_first() -> bool:
    """Whether this is the process that reads and writes the workdir, and speaks."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """What `function` returns on the first process, a value of JSON types; called there alone.

    Raises:
      UserError: it did there; then it is raised on all processes, as `Everywhere`.
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
        raise Everywhere(said["error"])
    return said["value"]


def from_first(tree: T) -> T:
    """The arrays of the first process; those of the others give their shapes and types."""
    if jax.process_count() == 1:
        return tree
    # As bytes: JAX sends arrays by adding zeros, which makes 0.0 of -0.0.
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    content = np.frombuffer(b"".join(leaf.tobytes() for leaf in leaves), np.uint8)
    content = np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes()
    ends = np.cumsum([leaf.nbytes for leaf in leaves])
    return structure.unflatten(
        np.frombuffer(content[end - leaf.nbytes : end], leaf.dtype).reshape(leaf.shape)
        for leaf, end in zip(leaves, ends, strict=True)
    )


def _broadcast_text(text: str) -> str:
    """The first process' text."""
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    if not is_first():
        content = np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(content))).decode()


def check_same(values: dict[str, Any], what: str) -> None:
    """Refuses processes with different values, of JSON types; `what` is put before their names.

    Raises:
      UserError: on every process; where it can be told, with the name of what differs.
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
    everywhere = multihost_utils.process_allgather(np.int32(len(differing)))
    if not np.any(everywhere):
        return
    if differing:
        name = differing[0]
        here, there = (f"{v.get(name)}"[:80] for v in (ours, theirs))
        raise Everywhere(
            f"process {jax.process_index()} is not like process 0: {what}{name} is {here} here and "
            f"{there} there; start all with the same flags, and the same data"
        )
    others = ", ".join(map(str, np.flatnonzero(everywhere)))
    raise Everywhere(
        f"the processes are not alike: number {others} differs from process 0; start all with the "
        "same flags, and the same data"
    )


@contextlib.contextmanager
def joined(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: float,
) -> Iterator[None]:
    """Belongs to a job of several processes; without an address, to that of the cluster.

    Where a process fails or is lost, all others end too, with a line that says so.

    Args:
      coordinator_address: `host:port` of the first process, where it waits for the others.
      num_processes: how many there are.
      process_id: the number of this one, from 0.
      timeout: seconds to wait for others at the start, and after which one that is silent is lost.

    Raises:
      UserError: there is no such cluster, or not all processes come.
    """
    _join(coordinator_address, num_processes, process_id, timeout)
    # Of the service that JAX starts for the processes: what they tell each other besides arrays.
    client = ocp.multihost.get_jax_distributed_client()
    heart = threading.Event()
    words = _last_words()

    def say(state: str) -> None:
        client.key_value_set(_key(jax.process_index()), state, allow_overwrite=True)

    def lost(reason: str) -> None:
        print(
            f"error: process {jax.process_index()} ends: {reason}; start the job again, and it "
            "goes on from its latest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        words.communicate(b".")
        os._exit(LOST_PEER)  # threads that wait for the lost one would hold up a proper exit

    threading.Thread(target=_watch, args=(client, say, lost, heart, timeout), daemon=True).start()

    def together() -> None:
        """Ends as all others do."""
        heart.set()
        say(ENDED)
        jax.distributed.shutdown()
        words.communicate(b".")

    try:
        yield
    except (Everywhere, Stopped):
        together()
        raise
    except BaseException as error:  # of this process alone
        told = isinstance(error, UserError)
        if isinstance(error, Exception) and not told:
            # Perhaps a collective that lacks a process. The watch then ends this one, in time.
            time.sleep(1.5 * timeout)
        heart.set()
        with contextlib.suppress(OSError):
            if told:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
            sys.stdout.flush()
        say(FAILED + (" ".join(str(error).split()) or type(error).__name__))
        if is_first():
            time.sleep(3 * _interval(timeout))  # until all have heard: what they hear goes with it
        words.communicate(b".")
        # A proper exit would wait for the others, and then abort.
        os._exit(error.status if told else 1)
    together()


def _join(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: float,
) -> None:
    if coordinator_address is not None:
        if num_processes is None or process_id is None:
            raise UserError("--coordinator_address wants --num_processes and --process_id too")
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id is {process_id}: of {num_processes} processes "
                f"(--num_processes) they are 0 to {num_processes - 1}"
            )
        _wait_for_coordinator(coordinator_address, process_id, timeout)
    elif (num_processes, process_id) != (None, None):
        raise UserError("--num_processes and --process_id want --coordinator_address=HOST:PORT too")
    # The processes reach each other directly, also where the web is behind a proxy.
    os.environ.setdefault("grpc_proxy", "")
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=max(1, round(timeout)),
            # Later than ours: JAX ends a process without a line that says what to do.
            heartbeat_timeout_seconds=round(3 * timeout) + 10,
            shutdown_timeout_seconds=round(3 * timeout) + 10,
        )
    except ValueError as error:
        raise UserError(
            "--distributed: there is no cluster here that JAX knows (TPU pod, SLURM, Open MPI); "
            "say --coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    except RuntimeError as error:
        raise NotAll(
            f"not all processes of the job came within {timeout:.0f} seconds (--peer_timeout)"
        ) from error


def _wait_for_coordinator(address: str, process_id: int, timeout: float) -> None:
    """Waits until the first process listens, which it may not do yet."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator_address is {address!r}: it is to be HOST:PORT")
    host = host.strip("[]")
    try:
        socket.getaddrinfo(host, int(port))
    except (OSError, UnicodeError) as error:
        raise UserError(f"--coordinator_address={address}: there is no host {host}") from error
    if process_id == 0:
        return
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise NotAll(
                    f"--coordinator_address={address} cannot be reached within {timeout:.0f} "
                    f"seconds (--peer_timeout; {error.strerror or error}): is process 0 there?"
                ) from error
            time.sleep(0.2)


def _key(process: int | str) -> str:
    return f"bnlstm_jax/processes/{process}"


def _interval(timeout: float) -> float:
    """Seconds between signs of life."""
    return min(1.0, timeout / 5)


def _watch(
    client: Any,
    say: Callable[[str], None],
    lost: Callable[[str], None],
    heart: threading.Event,
    timeout: float,
) -> None:
    """Says that this process lives until `heart` is set; calls `lost` when another does not."""
    heard: dict[str, tuple[str, float]] = {}  # by process: its last words, and when they changed
    beat = 0
    while not heart.wait(_interval(timeout)):
        beat += 1
        try:
            say(str(beat))
            states = dict(client.key_value_dir_get(_key("")))
        except Exception as error:  # whatever it is, there is no hearing the others any more
            if heart.is_set():
                return
            lost(f"process 0 is lost ({str(error).splitlines()[0][:80]})")
        now = time.monotonic()
        for key, state in states.items():
            name = f"process {key.rpartition('/')[2]}"
            if state.startswith(FAILED):
                lost(f"{name} {state}")
            if heard.get(key, ("", 0.0))[0] != state:
                heard[key] = state, now
            elif state != ENDED and now - heard[key][1] > timeout:
                lost(f"{name} has not been heard of for {timeout:.0f} seconds")


def _last_words() -> subprocess.Popen:
    """A process that says a line when this one ends before it was told that all is well.

    JAX ends a process at once, by an abort that nothing can catch, when the first is lost.
    """
    line = (
        f"error: process {jax.process_index()} ended: it was killed, or process 0 was lost; "
        "start the job again, and it goes on from its latest checkpoint"
    )
    listen = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"
    return subprocess.Popen(
        [sys.executable, "-S", "-c", listen, line], stdin=subprocess.PIPE, start_new_session=True
    )
