"""Where a training's arrays lie: on one device, or split over a mesh of them; how they get there, and functions compiled for it.

On one device nothing here leaves a trace in what is compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from wmtp_jax.errors import UserError
from wmtp_jax.parallel import devices, sharding
from wmtp_jax.parallel.mesh import described, fit
from wmtp_jax.parallel.processes import ALONE, Processes, join
from wmtp_jax.settings import Configuration

Parameters = dict[str, Any]  # nested, a leaf an array


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where everything of a training lies.

    Attributes:
      device: the first one of this process; the others are of its kind.
      mesh: over which of its axes arrays are split; None: one device has everything.
      processes: whose devices these are.
    """

    device: jax.Device
    mesh: Mesh | None = None
    processes: Processes = ALONE

    def __str__(self) -> str:
        if self.mesh is None:
            return self.device.device_kind
        among = f", {self.processes.count} processes" if self.processes.count > 1 else ""
        return f"{self.mesh.size} x {self.device.device_kind} ({described(self.mesh.shape)}{among})"

    @property
    def peak_flops(self) -> float | None:
        """Operations a second of all devices together; simulated CPU devices of a host share its cores."""
        of_one, count = devices.peak_flops(self.device), 1 if self.mesh is None else self.mesh.size
        return of_one and of_one * (self.processes.count if self.device.platform == "cpu" else count)

    @property
    def own(self) -> Placement:
        """What this process may use without the others: everything where it is the only one, else its first device."""
        return self if self.processes.count == 1 else Placement(self.device)

    @property
    def whole(self) -> NamedSharding | None:
        """Of what every device has whole."""
        return None if self.mesh is None else sharding.replicated(self.mesh)

    def shardings(self, tree: Any) -> Any:
        """Of every leaf of parameters or of a state, arrays or shapes; None on one device."""
        return None if self.mesh is None else sharding.tree_shardings(self.mesh, tree)

    def active(self) -> contextlib.AbstractContextManager:
        """While it is open, what is traced is traced for this placement."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def jit(self, function: Callable, *, out: Any = None, donate: int | None = None) -> Callable:
        """`function` compiled.

        Args:
          out: shardings of its results, a tree or the beginning of one; None leaves them to the compiler.
          donate: the argument whose memory it takes over.
        """
        compiled = jax.jit(function, out_shardings=out, donate_argnums=() if donate is None else donate)
        if self.mesh is None:
            return compiled

        def called(*arguments: Any) -> Any:
            with jax.set_mesh(self.mesh):
                return compiled(*arguments)

        return called

    def batch(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """The rows of a batch that this process reads (`processes.share`), to the batch of all: rows and positions split. On one
        device the compiled function moves it."""
        if self.mesh is None:
            return batch
        lies, count = sharding.batch_shardings(self.mesh, batch), self.processes.share[1]
        return {
            name: jax.make_array_from_process_local_data(lies[name], column, (len(column) * count, *column.shape[1:]))
            for name, column in batch.items()
        }

    def padded(self, batch: Mapping[str, np.ndarray]) -> tuple[Mapping[str, Any], int]:
        """A whole batch with rows of padding (zeros) up to a number that the mesh shares out, and how many are real."""
        rows = len(batch["tokens"])
        missing = -rows % sharding.batch_shards(self.mesh)
        if missing:
            batch = {name: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for name, x in batch.items()}
        if self.mesh is None:
            return batch, rows
        lies = sharding.batch_shardings(self.mesh, batch)
        return {name: sharding.place(column, lies[name]) for name, column in batch.items()}, rows

    def replicate(self, array: np.ndarray) -> jax.Array:
        """An array of the host, whole on every device."""
        return jax.numpy.asarray(array) if self.mesh is None else sharding.place(array, self.whole)

    def parameters(self, named: Iterable[tuple[str, np.ndarray]]) -> Parameters:
        """Parameters of the host by dotted name, each moved before the next is asked for."""
        return traverse_util.unflatten_dict({name: self._parameter(name, array) for name, array in named}, sep=".")

    def tree(self, parameters: Parameters) -> Parameters:
        """The same of a tree of arrays that are on the host or on one device."""
        if self.mesh is None:
            return parameters
        return self.parameters((name, np.asarray(leaf)) for name, leaf in traverse_util.flatten_dict(parameters, sep=".").items())

    def _parameter(self, name: str, array: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jax.device_put(array)
        axes = sharding.parameter_axes(name, array.ndim)
        return sharding.place(array, NamedSharding(self.mesh, sharding.spec(axes)))


def choose_placement(name: str | None, config: Configuration) -> Placement:
    """The device or the devices that everything runs on, those of all processes that the environment speaks of.

    Args:
      name: of the platform (cpu, cuda, tpu); None: the best there is.
      config: says the mesh.

    Raises:
      UserError: there is no such device here, or the mesh does not fit the devices or the batches.
    """
    processes = join()
    device = devices.choose_device(name)
    there = jax.devices()
    sizes, accumulation, told = fit(config, len(there), exactly=processes.count > 1)
    if processes.first:
        for line in told:
            print(line, file=sys.stderr)
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(sizes, there[:count]) if count > 1 else None
    if processes.count > 1:
        processes.share = _row_share(mesh, config.train.batch_size // accumulation)
    else:
        processes = Processes()
    processes.accumulation = accumulation
    return Placement(device, mesh, processes)


def _row_share(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Which of how many equal parts of a batch's rows the devices of this process hold."""
    held = NamedSharding(mesh, sharding.spec(("batch",))).addressable_devices_indices_map((rows,))
    parts = {index[0].indices(rows)[:2] for index in held.values() if index is not None}
    start, stop = min(start for start, _ in parts), max(stop for _, stop in parts)
    size = stop - start
    if sum(stop - start for start, stop in parts) != size or rows % size or start % size:
        raise UserError(
            f"config.mesh.data, config.mesh.fsdp: the rows of process {jax.process_index()} ({sorted(parts)} of {rows}) are no "
            "even part of a batch; let data x fsdp be a multiple or a divisor of the number of processes"
        )
    return start // size, rows // size
