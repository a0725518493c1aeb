"""`--dry_run`: what a run would do and need."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wmtp_jax import summary
from wmtp_jax.experiment import (
    critic_settings,
    model_settings,
    optimizer_settings,
    total_steps,
    trainable,
    weighting_settings,
)
from wmtp_jax.model import abstract_parameters
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.origins import is_published
from wmtp_jax.parameters_file import FILE, read_metadata
from wmtp_jax.placement import Placement
from wmtp_jax.pretrained import open_pretrained
from wmtp_jax.run_directory import find_checkpoint
from wmtp_jax.settings import ModelSettings
from wmtp_jax.sharding import batch_shardings
from wmtp_jax.stages import Stage, plan_rows
from wmtp_jax.train_step import Reference, initial_state, train_step


def print_plan(stage: Stage, device: Placement) -> None:
    """What a run would do and need; compiles the real update without making its arrays."""
    config, corpus, settings = stage.config, stage.corpus, stage.model
    steps = total_steps(config, corpus)
    weighting, critic = weighting_settings(config), critic_settings(config)
    definition, parameters = abstract_parameters(settings, value_head=critic is not None)
    optimizer = make_optimizer(optimizer_settings(config), steps)
    state = jax.eval_shape(lambda parameters: initial_state(parameters, optimizer, trainable(config)), parameters)
    # One that scores rewards is gone before the update.
    in_step = weighting.needs_reference and not stage.has_losses
    reference = _abstract_reference(config, settings.vocabulary_size) if in_step else None
    shape = (config.train.batch_size, config.data.sequence_length)
    heads = (*shape, settings.num_heads)
    shapes = {name: (shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    shapes |= {"targets": (heads, np.int32), "mask": (heads, np.bool_)}
    if critic is not None:
        shapes |= {"rewards": (shape, np.float32), "rewarded": (shape, np.bool_)}
    if stage.has_losses:
        shapes["reference_loss"] = (shape, np.float32)
    batch = {name: jax.ShapeDtypeStruct(*description) for name, description in shapes.items()}
    reference_parameters = reference.parameters if reference else None
    if device.mesh is not None:
        state, reference_parameters = _lying(device, state), _lying(device, reference_parameters)
        lies = batch_shardings(device.mesh, batch)
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies[name]) for name, x in batch.items()}
    update = functools.partial(
        train_step,
        definition=definition,
        optimizer=optimizer,
        settings=weighting,
        critic=critic,
        reference_definition=reference.definition if reference else None,
        accumulation=config.train.accumulation,
        chunk_size=config.train.loss_chunk or None,
        trainable=trainable(config),
    )
    out = None if device.mesh is None else (device.shardings(state), device.whole)
    with device.active():
        lowered = jax.jit(update, donate_argnums=0, out_shardings=out).lower(state, batch, reference_parameters)
    memory = lowered.compile().memory_analysis()

    def size(tree: Any) -> int:  # on one device
        def shape(leaf: Any) -> tuple[int, ...]:
            return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)

        return sum(math.prod(shape(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))

    rows = [
        *plan_rows(stage, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))),
        ("memory", ("" if device.mesh is None else "a device: ") +
                   f"{summary.human_bytes(size(state.parameters))} parameters, "
                   f"{summary.human_bytes(size(state.optimizer_state))} optimizer, "
                   f"{summary.human_bytes(memory.temp_size_in_bytes)} gradients and temporaries (compiled)"
                   + (f", {summary.human_bytes(size(reference_parameters))} reference" if reference else "")),
        ("device", f"{device} ({device.device.platform})"),
    ]  # fmt: skip
    print(summary.facts("plan (--dry_run: nothing is trained)", rows))


def _lying(device: Placement, tree: Any) -> Any:
    """Shapes with where they lie on the mesh."""
    describe = lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies)  # noqa: E731
    return jax.tree.map(describe, tree, device.shardings(tree))


def _abstract_reference(config: ConfigDict, vocabulary_size: int) -> Reference:
    """The structure and shapes of the reference, whether it is given or to be trained."""
    if is_published(config.reference.path):
        settings = open_pretrained(config.reference.path).settings
    elif config.reference.path:
        settings = ModelSettings(**read_metadata(find_checkpoint(config.reference.path) / FILE)["model"])
    else:
        settings = model_settings(config.reference.model, vocabulary_size, config.data.sequence_length)
    return Reference(*abstract_parameters(settings))
