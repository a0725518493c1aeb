"""The configuration, unpacked: the plain settings and functions that an experiment is made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from wmtp_jax.data.corpus import Corpus, load_corpus
from wmtp_jax.data.pipeline import rows_per_epoch
from wmtp_jax.model import Model, ModelSettings
from wmtp_jax.optimizer import OptimizerSettings, make_optimizer
from wmtp_jax.train_step import Parameters, Weighting, split, train_step


def model_settings(model: ConfigDict, vocabulary_size: int, sequence_length: int) -> ModelSettings:
    """The configuration's `model` section with every "derived" 0 resolved."""
    plain = {key: value for key, value in model.items() if key != "heads"}
    if not plain["mlp_width"]:
        wanted = model.width * (8 / 3 if model.activation == "swiglu" else 4)
        plain["mlp_width"] = math.ceil(wanted / 32) * 32
    plain["kv_heads"] = model.kv_heads or model.attention_heads
    plain["head_dim"] = model.head_dim or model.width // model.attention_heads
    plain["max_positions"] = model.max_positions or sequence_length
    return ModelSettings(
        vocabulary_size=vocabulary_size, num_heads=model.heads.count, head_kind=model.heads.kind, **plain
    )


def initial_parameters(settings: ModelSettings, seed: int) -> tuple[nnx.GraphDef, Parameters]:
    """A model's structure and random parameters, a function of the seed alone."""
    definition, _ = abstract_parameters(settings)
    return definition, jax.jit(lambda key: split(Model(settings, rngs=nnx.Rngs(key)))[1])(jax.random.key(seed))


def abstract_parameters(settings: ModelSettings) -> tuple[nnx.GraphDef, Parameters]:
    """A model's structure and its parameters' shapes and types, without making them."""
    return split(nnx.eval_shape(lambda: Model(settings, rngs=nnx.Rngs(0))))


def load_data(config: ConfigDict) -> Corpus:
    c = config.data
    return load_corpus(
        c.sources,
        weights=c.source_weights,
        tokenizer=c.tokenizer,
        vocabulary_size=c.vocabulary_size,
        sequence_length=c.sequence_length,
        validation_fraction=c.validation_fraction,
        cache_dir=c.cache_dir,
    )


def total_steps(config: ConfigDict, corpus: Corpus) -> int:
    if config.train.steps:
        return config.train.steps
    return max(1, math.ceil(config.train.epochs * rows_per_epoch(corpus) / config.train.batch_size))


def weighting_settings(config: ConfigDict) -> Weighting:
    """The section `weighting`, frozen, with the reference's alignment."""
    return Weighting(**config.weighting, alignment=config.reference.alignment)


def optimizer_settings(config: ConfigDict) -> OptimizerSettings:
    """The section `optimizer`, frozen."""
    return OptimizerSettings(**config.optimizer)


def make_update(
    config: ConfigDict, definition: nnx.GraphDef, reference_definition: nnx.GraphDef | None, *, steps: int
) -> Callable[..., Any]:
    """The jitted update `(state, batch, reference parameters) -> (state, metrics)`; it takes over the state's memory."""
    update = functools.partial(
        train_step,
        definition=definition,
        optimizer=make_optimizer(optimizer_settings(config), steps),
        settings=weighting_settings(config),
        reference_definition=reference_definition,
        seed=config.train.seed,
        accumulation=config.train.accumulation,
        chunk_size=config.train.loss_chunk or None,
    )
    return jax.jit(update, donate_argnums=0)


def reference_config(config: ConfigDict) -> ConfigDict:
    """The configuration of the reference's own run: its model and steps, unweighted, everything else alike."""
    c = ConfigDict(config.to_dict())
    c.model = config.reference.model.copy_and_resolve_references()
    c.weighting.algorithm = "baseline-mtp"
    c.weighting.form = "default"
    c.train.steps, c.train.epochs = config.reference.steps, 0.0
    c.eval.bigram, c.eval.completions, c.eval.token_rows = False, 0, 0
    if c.eval.stop_metric.startswith("eval/ce_head_"):
        c.eval.stop_metric = "eval/ce_head_0"
    if c.checkpoint.best_metric.startswith("eval/ce_head_"):
        c.checkpoint.best_metric = "eval/ce_head_0"
    return c.lock()
