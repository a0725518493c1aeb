"""Several processes that train one model: who they are by the environment, how they agree, what becomes of them when one dies.

The launchers say it by environment variables: plain `MASTER_ADDR MASTER_PORT WORLD_SIZE RANK`; VESSL with NUM_NODES for
WORLD_SIZE; SLURM's own of a step; an indexed Kubernetes job or a JobSet with JOB_COMPLETION_INDEX for RANK. jax is imported
by `join` alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from wmtp_jax.cli import Stopped
from wmtp_jax.errors import NonFiniteLoss, UserError

COUNTS = ("WORLD_SIZE", "NUM_NODES", "SLURM_STEP_NUM_TASKS")
INDICES = ("RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
LOCAL_INDICES = ("LOCAL_RANK", "SLURM_LOCALID")
START_SECONDS = 300  # until all have come
BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0  # without a beat: a process is gone
GRACE_SECONDS = 5.0  # in which a process may fail by itself for the reason that another one told
EXIT_LOST = 5  # of a process that ends because another one did
# Words of errors that a dead process causes in the others: gloo's and NCCL's, and those of jax's coordinator.
_LOST_PEER = re.compile(r"gloo|nccl|collective|coordination|peer|socket|UNAVAILABLE", re.IGNORECASE)
_AGAIN = "start all processes again: --resume=auto goes on from the last checkpoint"
_HOURS = 24 * 3600 * 1000  # of a barrier: one process may have much to do; the watch ends waiting for a dead one
_KEY = "wmtp"


# ---- who they are ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the environment says: where process 0 listens, how many there are, which of them this is, and which of those on this
    host (None: the only one, or unknown)."""

    address: str
    count: int
    index: int
    local_index: int | None = None


def cluster_from(environment: Mapping[str, str]) -> Cluster | None:
    """The processes that the environment variables speak of; None for a single one.

    Raises:
      UserError: variables that are missing, contradict each other or are no numbers, named.
    """
    in_step = "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment
    counts = {name: _number(environment, name) for name in COUNTS if environment.get(name) and (in_step or "SLURM" not in name)}
    # A task number of SLURM outside a step, or of an indexed job by itself, says nothing of others.
    indices = {name: _number(environment, name) for name in INDICES if environment.get(name)}
    if not in_step:
        indices.pop("SLURM_PROCID", None)
    plain = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if environment.get(name)]
    if not counts:
        if plain:
            raise UserError(f"{plain[0]} is set, but neither WORLD_SIZE nor NUM_NODES: set all of MASTER_ADDR, MASTER_PORT, "
                            "WORLD_SIZE, RANK, or none for a single process")  # fmt: skip
        return None
    count = _agreed(counts)
    if count < 1:
        raise UserError(f"{next(iter(counts))} = {count}: must be 1 or more processes")
    if count == 1:
        return None
    if not indices:
        raise UserError(f"{next(iter(counts))} = {count}, but RANK is not set: give every process its own, 0 to {count - 1}")
    index = _agreed(indices)
    if not 0 <= index < count:
        raise UserError(f"{next(iter(indices))} = {index}: must be 0 to {count - 1}, since {next(iter(counts))} = {count}")
    local = [_number(environment, name) for name in LOCAL_INDICES if environment.get(name)]
    several = _number(environment, "LOCAL_WORLD_SIZE") if environment.get("LOCAL_WORLD_SIZE") else None
    on_slurm = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "")) if in_step else None
    several = several or (int(on_slurm[0]) if on_slurm else 1)
    return Cluster(_address(environment, in_step), count, index, local[0] if local and several > 1 else None)


def refuse_several(why: str) -> None:
    """UserError where the environment speaks of several processes; `why` says who takes one."""
    if cluster := cluster_from(os.environ):
        raise UserError(f"WORLD_SIZE, NUM_NODES or SLURM speak of {cluster.count} processes: {why}; unset them")


def _address(environment: Mapping[str, str], in_step: bool) -> str:
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if in_step and not host and environment.get("SLURM_STEP_NODELIST"):
        host = first_host(environment["SLURM_STEP_NODELIST"])
        # Jobs that share a host get ports of their own.
        port = port or str(61_440 + int(environment.get("SLURM_JOB_ID", "0")) % 4096)
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)):
        if not value:
            raise UserError(f"{name} is not set: every process needs the address and a free port of the first one's host")
    assert host and port
    if not port.isdigit() or not 0 < int(port) < 65_536:
        raise UserError(f"MASTER_PORT = {port!r}: must be a port, 1 to 65535")
    return f"[{host}]:{port}" if host.count(":") > 1 and not host.startswith("[") else f"{host}:{port}"


def first_host(nodes: str) -> str:
    """`node[003-005,9],login1 -> node003`: the first of a list of hosts as SLURM writes it."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,]*)", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST = {nodes!r}: names no host")
    name, numbers, rest = match.groups()
    return name + (re.split(r"[,-]", numbers)[0] if numbers else "") + (rest if numbers else "")


def listening_address(address: str) -> str:
    """Where process 0 listens for the others: on the loopback interface where they are all here, else on every one."""
    host, port = address.rsplit(":", 1)
    try:
        found = {entry[0]: entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)}
    except socket.gaierror as error:
        raise UserError(f"MASTER_ADDR = {host!r}: can't be resolved ({error.strerror})") from error
    numeric = found.get(socket.AF_INET)
    if numeric is None:
        return f"[::]:{port}"
    return f"{numeric if str(numeric).startswith('127.') else '0.0.0.0'}:{port}"


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise UserError(f"{name} = {environment[name]!r}: must be a number") from error


def _agreed(named: Mapping[str, int]) -> int:
    (name, value), *others = named.items()
    for other, number in others:
        if number != value:
            raise UserError(f"{name} = {value}, but {other} = {number}: they must be the same; unset one of them")
    return value


# ---- how they agree --------------------------------------------------------------------------------------------------


class Processes:
    """One process by itself. `Joined` has the same for several; what both backends and every stage see of it.

    Attributes:
      index, count: which of how many.
      share: (number, of how many): which part of a batch's rows this process reads.
      accumulation: micro-batches an update on their devices; None: as `train.accumulation` says.
    """

    index, count = 0, 1
    share: tuple[int, int] = (0, 1)
    accumulation: int | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes logs, metrics and the like."""
        return self.index == 0

    def agree(self, number: int | None) -> int | None:
        """The largest number that any process gave with the update before this call (None where none did), the same in every
        process at the same call. A single process gets its own number at once."""
        return number

    def barrier(self, name: str) -> None:
        """Returns when all processes have come here."""

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """UserError where a fact differs from what the first process has."""

    def tell(self, text: str) -> str:
        """The text that the first process gave."""
        return text


ALONE = Processes()


class Joined(Processes):
    """This process among others; see `join`."""

    def __init__(self, cluster: Cluster, client: Any):
        self.index, self.count = cluster.index, cluster.count
        self._client, self._calls = client, 0
        self._vote: Callable[[int], Any] | None = None
        self._waiting: Any = None

    def agree(self, number: int | None) -> int | None:
        # A reduction on the devices, in step with the updates: read one update late, it makes nobody wait.
        self._vote = self._vote or _voting()
        before, self._waiting = self._waiting, self._vote(number or 0)
        return None if before is None else int(before) or None

    def barrier(self, name: str) -> None:
        self._client.wait_at_barrier(f"{_KEY}/{name}/{self._call()}", _HOURS)

    def check_same(self, facts: Mapping[str, Any]) -> None:
        number = self._call()
        for position, (name, value) in enumerate(facts.items()):
            key = f"{_KEY}/same/{number}/{position}"
            if self.first:
                self._client.key_value_set(key, f"{name} = {value!r}")
            elif (told := self._client.blocking_key_value_get(key, _HOURS)) != f"{name} = {value!r}":
                raise UserError(f"process {self.index} has {name} = {value!r}, process 0 {told}: all must be started alike")

    def tell(self, text: str) -> str:
        key = f"{_KEY}/told/{self._call()}"
        if self.first:
            self._client.key_value_set(key, text)
        return self._client.blocking_key_value_get(key, _HOURS)

    def _call(self) -> int:
        # Every process makes the same calls in the same order.
        self._calls += 1
        return self._calls


def _voting() -> Callable[[int], Any]:
    import jax
    import numpy as np

    mesh = jax.make_mesh((jax.device_count(),), ("process",), axis_types=(jax.sharding.AxisType.Auto,))
    lies = jax.NamedSharding(mesh, jax.P("process"))
    largest = jax.jit(lambda votes: votes.max(), out_shardings=jax.NamedSharding(mesh, jax.P()))

    def vote(number: int) -> Any:
        mine = np.full(jax.local_device_count(), number, np.int32)
        return largest(jax.make_array_from_process_local_data(lies, mine))

    return vote


# ---- joining, and what ends it ---------------------------------------------------------------------------------------

_joined: Joined | None = None
_watch: _Watch | None = None


def join() -> Processes:
    """Joins the processes that the environment speaks of, once; before any device is asked for. All but the first print nothing
    to stdout from here on.

    Raises:
      UserError: the variables are wrong, or the others have not come.
    """
    global _joined, _watch
    if _joined is not None:
        return _joined
    cluster = cluster_from(os.environ)
    if cluster is None:
        return ALONE
    import jax
    from jax._src import distributed as runtime

    if cluster.index:
        # The descriptor itself: gloo prints as well.
        sys.stdout.flush()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    # Two programs that run at once would mix their messages on the one connection that gloo has.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `cli.StopSignals`
    try:
        jax.distributed.initialize(
            coordinator_address=cluster.address,
            num_processes=cluster.count,
            process_id=cluster.index,
            local_device_ids=cluster.local_index,
            coordinator_bind_address=listening_address(cluster.address),
            cluster_detection_method="deactivate",
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=int(4 * SILENT_SECONDS),  # later than `_Watch`, which names who is gone
        )
    except jax.errors.JaxRuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: process {cluster.index} of {cluster.count} could not meet the others at "
            f"{cluster.address} within {START_SECONDS} s ({first})"
        ) from error
    client = runtime.global_state.client
    _joined, _watch = Joined(cluster, client), _Watch(cluster, client, jax.errors.JaxRuntimeError)
    return _joined


@contextmanager
def together() -> Iterator[None]:
    """A block that may `join`: how it ends is told to the other processes. What ends all of them alike (the block's end, a
    signal, a loss that is not finite) waits for all; any other error does not."""
    global _joined, _watch
    try:
        yield
    except (Stopped, NonFiniteLoss):
        raise
    except BaseException as error:
        if _watch is not None:
            _watch.leave(error)
            _forget()
        raise
    finally:
        if _watch is not None:
            _watch.close()
            import jax

            jax.distributed.shutdown()
            _joined = _watch = None


def _forget() -> None:
    """Leaves jax's coordinator without a word: its own good-bye would wait for the others, and abort where they are gone."""
    global _joined, _watch
    from jax._src import distributed as runtime

    state = runtime.global_state
    for kept in (state.client, state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # never destroyed
    state.client = state.service = _joined = _watch = None


class _Watch:
    """A thread that says every few seconds that this process lives, and ends it where another one doesn't.

    A process that waits for a dead one's part of a sum waits in native code, where no exception reaches it: hence `os._exit`.
    """

    def __init__(self, cluster: Cluster, client: Any, unreachable: type[Exception]):
        self._cluster, self._client = cluster, client
        self._unreachable = unreachable
        self._done = threading.Event()
        self._beat = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._answered = self._began = time.monotonic()
        self._say("0")
        # Where its coordinator is gone, jax aborts this process, from a thread of its own.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        # (A handler of Python runs in the main thread, which may wait in native code.)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        self._thread = threading.Thread(target=self._run, name="processes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Before this process ends well: the others don't miss it."""
        self._say("done")
        self._done.set()

    def leave(self, error: BaseException) -> None:
        """Before this process ends by an error: the others are told which, and given time to hear it. Where the error may come of
        another one's death, that one is looked for first."""
        lines = str(error).strip().splitlines()
        first = lines[0] if lines else ""
        if not isinstance(error, UserError) and _LOST_PEER.search(str(error)):
            # The watch ends this process as soon as it knows who is missing.
            time.sleep(SILENT_SECONDS + 4 * BEAT_SECONDS)
        self._say(f"left {type(error).__name__}: {first}")
        self._done.set()
        deadline = time.monotonic() + GRACE_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < deadline and not self._others_left():
            time.sleep(BEAT_SECONDS / 4)

    def _others_left(self) -> bool:
        try:
            ended = [value for _, value in self._client.key_value_dir_get(f"{_KEY}/beat/") if not value.isdigit()]
        except self._unreachable:
            return True
        return len(ended) == self._cluster.count

    def _say(self, status: str) -> None:
        try:
            self._client.key_value_set(f"{_KEY}/beat/{self._cluster.index}", status, allow_overwrite=True)
        except self._unreachable as error:
            print(f"process {self._cluster.index}: process 0 does not answer ({type(error).__name__})", file=sys.stderr)

    def _run(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            if lost := self._look():
                print(f"error: {lost}", file=sys.stderr, flush=True)
                if self._cluster.index == 0:
                    # The others ask this process about the one that is gone.
                    time.sleep(GRACE_SECONDS + 2 * BEAT_SECONDS)
                os._exit(EXIT_LOST)

    def _aborted(self, number: int) -> None:
        host, port = self._cluster.address.rsplit(":", 1)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
                signal.signal(number, signal.SIG_DFL)  # of another reason: what called abort goes on with it
        except OSError as error:
            print(f"error: {self._first_is_gone(error)}", file=sys.stderr, flush=True)
            os._exit(EXIT_LOST)

    def _first_is_gone(self, error: Exception) -> str:
        c = self._cluster
        return (f"process 0 of {c.count} at {c.address} is gone (process {c.index} can't reach it: {type(error).__name__}); "
                f"{_AGAIN}")  # fmt: skip

    def _look(self) -> str:
        """Who is gone, and what to do; "" where all live."""
        index, count, now = self._cluster.index, self._cluster.count, time.monotonic()
        try:
            self._beat += 1
            self._client.key_value_set(f"{_KEY}/beat/{index}", str(self._beat), allow_overwrite=True)
            beats = {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(f"{_KEY}/beat/")}
            self._answered = time.monotonic()
        except self._unreachable as error:
            if now - self._answered < SILENT_SECONDS / 2:
                return ""
            return self._first_is_gone(error)
        for other in range(count):
            value, (before, since) = beats.get(other, ""), self._seen.get(other, ("", self._began))
            if value != before:
                self._seen[other] = (value, now)
                continue
            if other == index or value == "done":
                continue
            if value.startswith("left ") and now - since > GRACE_SECONDS:
                return f"process {other} of {count} stopped ({value.removeprefix('left ')}); {_AGAIN}"
            if now - since > SILENT_SECONDS:
                return f"process {other} of {count} is gone: not heard of for {now - since:.0f} s; {_AGAIN}"
        return ""
