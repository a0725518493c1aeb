"""Orbax checkpoints: parameters, optimizer state, counters, data position and what made them, one directory a step.

A checkpoint counts only when Orbax has renamed it into place with its commit marker; one that was cut off is ignored. The
parameters are an item of their own, so that evaluation, export and reference models read them without the optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.model import Model, ModelSettings
from wmtp_jax.train_step import Parameters, TrainState, split

FORMAT = 1
DIRECTORY = "checkpoints"


class Checkpoints:
    """The checkpoints of one run: the last few, and the best by a metric.

    Args:
      directory: made if it is not there.
      keep_last: how many of the newest to keep.
      best_metric: name of the evaluation metric whose lowest value is kept as well; "" for none. Only saves whose step
        was evaluated take part.
    """

    def __init__(self, directory: Path, *, keep_last: int, best_metric: str):
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
        self._pending: Any = None
        with disk_errors(directory, setting="--workdir"):
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
        scored = [c for c in self._checkpointer.checkpoints if c.metrics and self.best_metric in c.metrics]
        return min(scored, key=lambda c: c.metrics[self.best_metric]).step if scored else None

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Copies the state and writes it in the background; waits for the save before this one first.

        Args:
          state: the whole training state.
          metadata: JSON values that describe it; see `describe`.
          metrics: of an evaluation of this very state, if there was one.
        """
        step = int(state.step)
        self.wait()
        if step in self.steps():
            return
        with disk_errors(self.directory, setting="--workdir"):
            self._pending = self._checkpointer.save_checkpointables_async(
                step,
                {"parameters": state.parameters, "training": state._replace(parameters=None)._asdict()},
                force=True,
                metrics=metrics,
                custom_metadata={"format": FORMAT, **metadata},
            )

    def wait(self) -> None:
        """Until the last save is complete."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with disk_errors(self.directory, setting="--workdir"):
                pending.result()

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given to describe the state of this step."""
        return _read_metadata(self._checkpointer.checkpointables_metadata(step).custom_metadata, self.directory / str(step))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step; `like` gives the tree, shapes and types (arrays or `jax.ShapeDtypeStruct`).

        Raises:
          UserError: the checkpoint holds other parameters, named with both shapes.
        """
        stored = self._checkpointer.checkpointables_metadata(step).metadata
        like_training = like._replace(parameters=None)._asdict()
        where = self.directory / str(step)
        _check_shapes(stored["parameters"], like.parameters, where)
        _check_shapes(stored["training"], like_training, where)
        abstract = jax.tree.map(_abstract, {"parameters": like.parameters, "training": like_training})
        with _quiet_restore():
            loaded = self._checkpointer.load_checkpointables(step, abstract)
        return TrainState(**{**loaded["training"], "parameters": loaded["parameters"]})

    def close(self) -> None:
        """Waits for the last save and frees the directory."""
        self.wait()
        self._checkpointer.close()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path stands for: itself, or the newest complete one of a run directory.

    Raises:
      UserError: there is none.
    """
    path = Path(path).expanduser()
    if (path / "parameters").is_dir():
        return path
    folder = path / DIRECTORY if (path / DIRECTORY).is_dir() else path
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / "parameters").is_dir()]
    if not steps:
        raise UserError(f"{path}: no checkpoint here; give a run directory or a checkpoint (RUN/{DIRECTORY}/STEP)")
    return folder / str(max(steps))


def load_model(path: str | Path) -> tuple[nnx.GraphDef, Parameters, dict[str, Any]]:
    """The model of a run directory or a checkpoint, for evaluation or as a reference.

    Returns:
      its structure, its parameters, and the metadata that `describe` made.

    Raises:
      UserError: no checkpoint there, or not one of this program.
    """
    where = find_checkpoint(path)
    stored = ocp.checkpointables_metadata(where.absolute())
    metadata = _read_metadata(stored.custom_metadata, where)
    settings = ModelSettings(**metadata["model"])
    value_head = "value_head" in stored.metadata["parameters"]
    like = nnx.eval_shape(lambda: Model(settings, rngs=nnx.Rngs(0), value_head=value_head))
    definition, abstract = split(like)
    _check_shapes(stored.metadata["parameters"], abstract, where)
    with _quiet_restore():
        loaded = ocp.load_checkpointables(where.absolute(), {"parameters": jax.tree.map(_abstract, abstract)})
    return definition, loaded["parameters"], metadata


def _read_metadata(metadata: Any, where: Path) -> dict[str, Any]:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(f"{where}: not a checkpoint of this program (format {FORMAT})")
    return metadata


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_shapes(stored: Any, wanted: Any, where: Path) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        # Orbax gives named tuples back as dicts and tuples as lists, so paths are compared by their bare names.
        name = lambda path: ".".join(str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", e)))) for e in path)  # noqa: E731
        return {name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}

    have, want = shapes(stored), shapes(wanted)
    for key in sorted(have.keys() | want.keys()):
        if have.get(key) != want.get(key):
            describe_side = lambda shape: "absent" if shape is None else f"of shape {shape}"  # noqa: E731
            raise UserError(
                f"{where}: holds another model than the configuration describes: {key} is {describe_side(have.get(key))} "
                f"there and {describe_side(want.get(key))} here; give the configuration it was trained with"
            )


@contextmanager
def _quiet_restore() -> Iterator[None]:
    # Orbax warns that shardings come from the file where a leaf has none; every leaf here has one.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sharding info not provided when restoring")
        yield
