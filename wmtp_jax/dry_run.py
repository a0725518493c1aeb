"""`--dry_run`: what a run would do and need."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wmtp_jax import summary
from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.pipeline import rows_per_epoch
from wmtp_jax.experiment import (
    abstract_parameters,
    make_update,
    model_settings,
    optimizer_settings,
    total_steps,
    weighting_settings,
)
from wmtp_jax.flops import flops_per_token
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.reference import load_reference
from wmtp_jax.train_step import Reference, initial_state, is_local, needs_reference


def print_plan(config: ConfigDict, corpus: Corpus, device: jax.Device) -> None:
    """What a run would do and need; compiles the real update without making its arrays."""
    settings = model_settings(config.model, corpus.tokenizer.vocabulary_size, config.data.sequence_length)
    steps = total_steps(config, corpus)
    definition, parameters = abstract_parameters(settings)
    optimizer = make_optimizer(optimizer_settings(config), steps)
    state = jax.eval_shape(lambda parameters: initial_state(parameters, optimizer), parameters)
    weighting = weighting_settings(config)
    reference_note, reference = "none", None
    if needs_reference(weighting):
        if config.reference.path:
            reference = load_reference(
                config.reference.path, corpus, alignment=config.reference.alignment, num_heads=settings.num_heads
            )
            reference_note = f"{config.reference.path}, tokenizer checked"
        else:
            own = model_settings(config.reference.model, settings.vocabulary_size, config.data.sequence_length)
            reference = Reference(*abstract_parameters(own))
            reference_note = f"trained first, {config.reference.steps} steps, in WORKDIR/reference"
    shape = (config.train.batch_size, config.data.sequence_length)
    heads = (*shape, settings.num_heads)
    shapes = {name: (shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    shapes |= {"targets": (heads, np.int32), "mask": (heads, np.bool_)}
    batch = {name: jax.ShapeDtypeStruct(*description) for name, description in shapes.items()}
    reference_definition, reference_parameters = reference or (None, None)
    update = make_update(config, definition, reference_definition, steps=steps)
    compiled = update.lower(state, batch, reference_parameters).compile()
    memory = compiled.memory_analysis()

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))

    two_passes = config.train.accumulation > 1 and not is_local(weighting)
    rows = [
        ("algorithm", f"{config.weighting.algorithm}, form {config.weighting.form}, scope {config.weighting.scope}"),
        ("reference", reference_note),
        ("model", f"{settings.layers} layers, width {settings.width}, {settings.num_heads} {settings.head_kind} heads"),
        ("parameters", f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters)):,}"),
        ("batch", f"{shape[0]} rows of {shape[1]} tokens, {config.train.accumulation} micro-batches"),
        ("statistics pass", "one more forward pass an update: weights rank the whole batch" if two_passes else "none"),
        ("steps", f"{steps:,} updates, {steps * math.prod(shape):,} tokens, {_epochs(steps, config, corpus)} epochs"),
        ("operations", f"{flops_per_token(settings, shape[1]) / 1e6:.1f} Mflop a token, forward and backward"),
        ("memory", f"{summary.human_bytes(size(state.parameters))} parameters, "
                   f"{summary.human_bytes(size(state.optimizer_state))} optimizer, "
                   f"{summary.human_bytes(memory.temp_size_in_bytes)} gradients and temporaries (compiled)"
                   + (f", {summary.human_bytes(size(reference_parameters))} reference" if reference else "")),
        ("device", f"{device.device_kind} ({device.platform})"),
    ]  # fmt: skip
    print(summary.facts("plan (--dry_run: nothing is trained)", rows))


def _epochs(steps: int, config: ConfigDict, corpus: Corpus) -> str:
    return f"{steps * config.train.batch_size / rows_per_epoch(corpus):.2f}"
