"""The real update of a model for a mesh, lowered from shapes alone: nothing is allocated."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from wmtp_jax.checkpoint.parameters import FILE, read_metadata
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.model import Parameters, abstract_parameters, separate
from wmtp_jax.parallel import sharding
from wmtp_jax.pretrained import open_pretrained
from wmtp_jax.pretrained.locating import is_published
from wmtp_jax.settings import ModelSettings
from wmtp_jax.train_step import Reference, TrainState, initial_state, train_step
from wmtp_jax.update import Objective


class AbstractUpdate(NamedTuple):
    """An update and what it is given, as shapes with their shardings; `trained` are the parameters that have a gradient."""

    lowered: jax.stages.Lowered
    state: TrainState
    batch: dict[str, Any]
    reference: Reference | None
    trained: Parameters


def lower_update(
    settings: ModelSettings,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    rows: int,
    length: int,
    mesh: Mesh | None,
    reference: Reference | None,
    stored_losses: bool,
) -> AbstractUpdate:
    """Lowers `train_step` as training calls it.

    Args:
      settings: of the model.
      objective: what the update minimises.
      optimizer: of `make_optimizer`.
      rows, length: B and S of a batch.
      mesh: where it runs; None: one device.
      reference: structure and shapes of the model whose losses the step computes; None: it computes none.
      stored_losses: the batch brings the reference's losses.
    """
    with_values = objective.critic is not None
    definition, parameters = abstract_parameters(settings, value_head=with_values)
    state = jax.eval_shape(lambda parameters: initial_state(parameters, optimizer, objective.trainable), parameters)
    columns = objective.weighting.reference_columns if stored_losses else ()
    batch = _batch((rows, length), settings.num_heads, rewards=with_values, columns=columns)
    out = None
    if mesh is not None:
        out = (sharding.tree_shardings(mesh, state), sharding.replicated(mesh))
        state, reference = (_lying(tree, sharding.tree_shardings(mesh, tree)) for tree in (state, reference))
        batch = _lying(batch, sharding.batch_shardings(mesh, batch))
    update = functools.partial(train_step, definition=definition, optimizer=optimizer, objective=objective)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        lowered = jax.jit(update, donate_argnums=0, out_shardings=out).lower(state, batch, reference)
    # A part of a parameter may be what is trained, so shapes have to be cut.
    trained = jax.eval_shape(lambda parameters: separate(parameters, objective.trainable)[0], parameters)
    if mesh is not None:
        trained = _lying(trained, sharding.tree_shardings(mesh, trained))
    return AbstractUpdate(lowered, state, batch, reference, trained)


def abstract_reference(path: str, own: ModelSettings) -> Reference:
    """The structure and shapes of the reference: that at `path`, or where it is "" the one that is to be trained, `own`."""
    if is_published(path):
        own = open_pretrained(path).settings
    elif path:
        own = ModelSettings(**read_metadata(find_checkpoint(path) / FILE)["model"])
    return Reference(*abstract_parameters(own))


def _batch(
    shape: tuple[int, int], heads: int, *, rewards: bool, columns: tuple[str, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    shapes: dict[str, tuple[tuple[int, ...], type]] = {name: (shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    shapes |= {"targets": ((*shape, heads), np.int32), "mask": ((*shape, heads), np.bool_)}
    if rewards:
        shapes |= {"rewards": (shape, np.float32), "rewarded": (shape, np.bool_)}
    shapes |= {name: (shape, np.float32) for name in columns}
    return {name: jax.ShapeDtypeStruct(*description) for name, description in shapes.items()}


def _lying(tree: Any, shardings: Any) -> Any:
    describe = lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies)  # noqa: E731
    return jax.tree.map(describe, tree, shardings)


def bytes_on_a_device(tree: Any) -> int:
    """Of the part of every leaf that one device holds."""

    def shape(leaf: Any) -> tuple[int, ...]:
        lies = getattr(leaf, "sharding", None)
        return leaf.shape if lies is None else lies.shard_shape(leaf.shape)

    return sum(math.prod(shape(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
