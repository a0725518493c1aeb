"""Orbax checkpoints: parameters, optimizer state, counters and what made them, one directory a step.

A checkpoint counts only when Orbax has renamed it into place and its manifest is written (`manifest.py`); one that was cut off is
ignored. The parameters are an item of their own, in the file that both backends read (`parameters_file.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from orbax.checkpoint import v1 as ocp

from wmtp_jax.checkpoint.manifest import seal, settle
from wmtp_jax.checkpoint.mirror import Mirror
from wmtp_jax.checkpoint.parameters import (
    FILE,
    check_backend,
    check_shapes,
    read_arrays,
    read_metadata,
    read_parameters,
    write_arrays,
)
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.errors import check_room, disk_errors
from wmtp_jax.model import ModelSettings, Parameters, abstract_parameters, flatten, nest
from wmtp_jax.parallel import sharding
from wmtp_jax.parallel.processes import ALONE, Processes
from wmtp_jax.parallel.sharding import gather
from wmtp_jax.storage import files
from wmtp_jax.train_step import TrainState

BACKEND = "jax"


class Checkpoints:
    """The checkpoints of one run: the last few, and the best by a metric.

    Args:
      directory: made if it is not there.
      keep_last: how many of the newest to keep.
      best_metric: name of the evaluation metric whose lowest value is kept as well; "" for none. Only saves whose step
        was evaluated take part.
      mirror: what brings complete ones to object storage; None: they stay here.
      processes: that train together. Each writes its part of the optimizer's state, the first one the parameters and the
        manifest; all call every method alike, and see one directory.

    Raises:
      UserError: the directory can't be made, all that is in it is damaged, or its newest checkpoint is of the other backend.
    """

    def __init__(self, directory: Path, *, keep_last: int, best_metric: str, mirror: Mirror | None = None,
                 processes: Processes = ALONE):  # fmt: skip
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(keep_last)]
        if best_metric:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics[best_metric],
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            keep.append(best)
        self.directory = directory
        self.best_metric = best_metric
        self.keep_last, self._mirror, self._processes = keep_last, mirror, processes
        self._pending: Future | None = None
        self._sealer = ThreadPoolExecutor(1)
        with disk_errors(directory, setting="--workdir"):
            if processes.first and settle(directory) is not None:
                check_backend(find_checkpoint(directory), BACKEND)
            processes.barrier("settled")
            directory.mkdir(parents=True, exist_ok=True)
            _adapt_to_file_system(directory)
            self._checkpointer = ocp.training.Checkpointer(
                directory.absolute(),
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def best_step(self) -> int | None:
        """The step with the lowest value of the best metric; None where no save was evaluated."""
        evaluated: dict[int, Any] = {c.step: c.metrics or {} for c in self._checkpointer.checkpoints}
        scored = [(float(found[self.best_metric]), step) for step, found in evaluated.items() if self.best_metric in found]
        return min(scored)[1] if scored else None

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Copies the state and writes it in the background; waits for the save before this one first, and for an upload where
        two are outstanding.

        Args:
          state: the whole training state.
          metadata: JSON values that describe it.
          metrics: of an evaluation of this very state, if there was one.

        Raises:
          UserError: the disk has no room for it, or the save before this one failed.
        """
        step = int(state.step)
        self.wait()
        if step in self.steps():
            return
        if self._mirror is not None:
            self._mirror.wait_for_room()
        parameters = _ParametersItem(self._held(state.parameters), {"backend": BACKEND, **metadata})
        check_room(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state)), setting="--workdir")
        with disk_errors(self.directory, setting="--workdir"):
            saving = self._checkpointer.save_checkpointables_async(
                step,
                {"parameters": parameters, "training": state._replace(parameters=None)._asdict()},
                force=True,
                metrics=metrics,
            )
        self._pending = self._sealer.submit(self._seal, saving, step, metrics)

    def _held(self, parameters: Parameters) -> Parameters:
        """What this process writes of the parameters: one file holds them all, and the first process writes it."""
        if self._processes.count == 1:
            return parameters
        gathered = {}
        for name, leaf in flatten(parameters).items():
            whole = gather(leaf)
            if self._processes.first:
                gathered[name] = whole
        return nest(gathered)

    def _seal(self, saving: Any, step: int, metrics: dict[str, float] | None) -> None:
        saving.result()
        if not self._processes.first:
            return
        where = self.directory / str(step)
        seal(where, step, metrics=metrics, keep_last=self.keep_last, best_metric=self.best_metric)
        if self._mirror is not None:
            self._mirror.hand_over(where)

    def wait(self, timeout: float | None = None) -> None:
        """Until the last save is complete, or for as many seconds.

        Raises:
          UserError: the disk is full or closed.
        """
        if self._pending is not None and self._pending in wait([self._pending], timeout).done:
            pending, self._pending = self._pending, None
            with disk_errors(self.directory, setting="--workdir"):
                pending.result()

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given to describe the state of this step."""
        return read_metadata(self.directory / str(step) / FILE)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step; `like` gives the tree, shapes and types (arrays or `jax.ShapeDtypeStruct`).

        Raises:
          UserError: the checkpoint is damaged, or holds other parameters, named with both shapes.
        """
        where = self.directory / str(step)
        named, _ = read_arrays(where / FILE)
        check_shapes(named, _named(like.parameters), where)
        parameters = jax.tree.map(lambda array, leaf: sharding.place(array, _sharding(leaf)), nest(named), like.parameters)
        like_training = like._replace(parameters=None)._asdict()
        stored = ocp.metadata(where.absolute(), checkpointable_name="training").metadata
        check_shapes(_named(stored), _named(like_training), where)
        with _quiet_restore():
            training = self._checkpointer.load(
                step, jax.tree.map(_abstract, like_training), checkpointable_name="training"
            )
        return TrainState(**{**training, "parameters": parameters})  # pyrefly: ignore[invalid-argument]  # a dict, as it was saved

    def close(self) -> None:
        """Waits for the last save and frees the directory."""
        self._sealer.shutdown()
        self.wait()
        with disk_errors(self.directory, setting="--workdir"):
            self._checkpointer.close()


def load_model(path: str | Path) -> tuple[nnx.GraphDef, Parameters, dict[str, Any]]:
    """The model of a run directory or a checkpoint of either backend, for evaluation or as a reference.

    Returns:
      its structure, its parameters, and the metadata that it was saved with.

    Raises:
      UserError: no checkpoint there, one that is damaged or not of this program, or one without a whole model.
    """
    where = find_checkpoint(path)
    named, metadata = read_parameters(where)
    value_head = any(name.startswith("value_head.") for name in named)
    definition, abstract = abstract_parameters(ModelSettings(**metadata["model"]), value_head=value_head)
    check_shapes(named, _named(abstract), where)
    return definition, jax.device_put(nest(named)), metadata


class _ParametersItem:
    """Parameters as an item of an Orbax checkpoint (`ocp.handlers.StatefulCheckpointable`)."""

    def __init__(self, parameters: Parameters, metadata: dict[str, Any]):
        self.parameters, self.metadata = traverse_util.flatten_dict(parameters, sep="."), metadata

    async def save(self, directory: Any) -> Awaitable[None]:
        # What is returned runs in the background; by then the next update may own the arrays' memory, so they are copied here.
        for leaf in self.parameters.values():
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        named = {name: np.array(leaf) for name, leaf in self.parameters.items()}
        return self._write(directory, named)

    async def _write(self, directory: Any, named: dict[str, np.ndarray]) -> None:
        where = Path(await directory.await_creation())
        if named:
            write_arrays(where / FILE.name, named, self.metadata)

    async def load(self, directory: Any) -> Awaitable[None]:
        raise NotImplementedError("parameters are read without Orbax: parameters_file.read_arrays")


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))


def _named(tree: Any) -> dict[str, Any]:
    """Leaves with a shape, by dotted path of bare names: Orbax gives named tuples back as dicts and tuples as lists."""

    def name(path: tuple) -> str:
        return ".".join(str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", e)))) for e in path)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name(path): leaf for path, leaf in leaves if hasattr(leaf, "shape")}


def _adapt_to_file_system(directory: Path) -> None:
    """Has tensorstore, which writes the optimizer's state, do without what the file system of a directory lacks. Orbax offers no
    setting for it. Files that stand for locks do for files that one process writes; `seal` syncs what it lists."""
    lacks: dict[str, Any] = {}
    if not files.has_record_locks(directory):
        lacks["file_io_locking"] = {"mode": "lockfile"}
    if not files.sync(directory):
        lacks["file_io_sync"] = False
    if lacks:
        from orbax.checkpoint._src.serialization import tensorstore_utils

        for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
            context.update(lacks)


@contextmanager
def _quiet_restore() -> Iterator[None]:
    # Orbax warns that shardings come from the file where a leaf has none; every leaf here has one.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sharding info not provided when restoring")
        yield
