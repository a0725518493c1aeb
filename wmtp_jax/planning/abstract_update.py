"""The real update of a configuration for a mesh, lowered from shapes alone: nothing is allocated."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from wmtp_jax.checkpoint.parameters import FILE, read_metadata
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.model import Parameters, abstract_parameters, separate
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.parallel import sharding
from wmtp_jax.pretrained import open_pretrained
from wmtp_jax.run.inputs import is_published
from wmtp_jax.run.unpacking import model_settings, objective, optimizer_settings
from wmtp_jax.settings import ModelSettings
from wmtp_jax.train_step import Reference, TrainState, initial_state, train_step


class AbstractUpdate(NamedTuple):
    """An update and what it is given, as shapes with their shardings; `trained` are the parameters that have a gradient."""

    lowered: jax.stages.Lowered
    state: TrainState
    batch: dict[str, Any]
    reference: Reference | None
    trained: Parameters


def lower_update(
    config: ConfigDict,
    settings: ModelSettings,
    *,
    mesh: Mesh | None,
    steps: int,
    reference: Reference | None,
    stored_losses: bool,
) -> AbstractUpdate:
    """Lowers `train_step` as training calls it.

    Args:
      mesh: where it runs; None: one device.
      steps: of the learning-rate schedule.
      reference: structure and shapes of the model whose losses the step computes; None: it computes none.
      stored_losses: the batch brings the reference's losses.
    """
    minimised = objective(config)
    with_values = minimised.critic is not None
    definition, parameters = abstract_parameters(settings, value_head=with_values)
    optimizer = make_optimizer(optimizer_settings(config), steps)
    state = jax.eval_shape(lambda parameters: initial_state(parameters, optimizer, minimised.trainable), parameters)
    columns = minimised.weighting.reference_columns if stored_losses else ()
    batch = _batch(config, settings.num_heads, rewards=with_values, columns=columns)
    out = None
    if mesh is not None:
        out = (sharding.tree_shardings(mesh, state), sharding.replicated(mesh))
        state, reference = (_lying(tree, sharding.tree_shardings(mesh, tree)) for tree in (state, reference))
        batch = _lying(batch, sharding.batch_shardings(mesh, batch))
    update = functools.partial(train_step, definition=definition, optimizer=optimizer, objective=minimised)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        lowered = jax.jit(update, donate_argnums=0, out_shardings=out).lower(state, batch, reference)
    # A part of a parameter may be what is trained, so shapes have to be cut.
    trained = jax.eval_shape(lambda parameters: separate(parameters, minimised.trainable)[0], parameters)
    if mesh is not None:
        trained = _lying(trained, sharding.tree_shardings(mesh, trained))
    return AbstractUpdate(lowered, state, batch, reference, trained)


def abstract_reference(config: ConfigDict, vocabulary_size: int) -> Reference:
    """The structure and shapes of the reference, whether it is given or to be trained."""
    if is_published(config.reference.path):
        settings = open_pretrained(config.reference.path).settings
    elif config.reference.path:
        settings = ModelSettings(**read_metadata(find_checkpoint(config.reference.path) / FILE)["model"])
    else:
        settings = model_settings(config.reference.model, vocabulary_size, config.data.sequence_length)
    return Reference(*abstract_parameters(settings))


def _batch(
    config: ConfigDict, heads: int, *, rewards: bool, columns: tuple[str, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.train.batch_size, config.data.sequence_length)
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
