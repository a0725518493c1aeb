"""The configuration, unpacked: the plain settings that an experiment is made of, and the configurations of its stages."""

from __future__ import annotations

import math
from typing import Any

from ml_collections import ConfigDict

from wmtp_jax.config import defaults
from wmtp_jax.data.corpus import Corpus, load_corpus
from wmtp_jax.data.pipeline import rows_per_epoch
from wmtp_jax.parallel.processes import Processes
from wmtp_jax.run.inputs import tokenizer_of
from wmtp_jax.settings import Critic, ModelSettings, OptimizerSettings, Weighting
from wmtp_jax.trainable import Trainable
from wmtp_jax.update import Objective


def load_data(config: ConfigDict) -> Corpus:
    """The corpus; with published weights, and unless another is named, cut by their tokenizer."""
    c = config.data
    own = c.tokenizer == "bpe" and config.pretrained.path
    return load_corpus(
        c.sources,
        weights=c.source_weights,
        tokenizer=tokenizer_of(config.pretrained.path) if own else c.tokenizer,
        vocabulary_size=c.vocabulary_size,
        sequence_length=c.sequence_length,
        validation_fraction=c.validation_fraction,
        cache_dir=c.cache_dir,
        label_field=c.label_field,
        failed_in_loss=c.failed_in_loss,
    )


def as_placed(config: ConfigDict, processes: Processes) -> ConfigDict:
    """The configuration with the micro-batches that an update takes on the devices of these processes."""
    if processes.accumulation in (None, config.train.accumulation):
        return config
    c = ConfigDict(config.to_dict())
    c.train.accumulation = processes.accumulation
    return c.lock()


def total_steps(config: ConfigDict, corpus: Corpus) -> int:
    if config.train.steps:
        return config.train.steps
    return max(1, math.ceil(config.train.epochs * rows_per_epoch(corpus) / config.train.batch_size))


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


def adapter_settings(config: ConfigDict) -> dict[str, Any]:
    """The fields of `ModelSettings` that say what adapters the trunk has."""
    c = config.pretrained
    return {"lora_rank": c.lora_rank, "lora_scale": c.lora_alpha / c.lora_rank} if c.trainable == "lora" else {}


def trainable(config: ConfigDict) -> Trainable:
    """What a run of this configuration trains."""
    return Trainable(config.pretrained.trainable, config.model.heads.kind)


def weighting_settings(config: ConfigDict) -> Weighting:
    """The section `weighting`, frozen."""
    return Weighting(**config.weighting)


def objective(config: ConfigDict) -> Objective:
    """What the updates of a model minimise."""
    return Objective(
        weighting=weighting_settings(config),
        alignment=config.reference.alignment,
        critic=critic_settings(config),
        trainable=trainable(config),
        seed=config.train.seed,
        accumulation=config.train.accumulation,
        chunk_size=config.train.loss_chunk or None,
    )


def critic_settings(config: ConfigDict) -> Critic | None:
    """How the value head learns and what its values say; None for algorithms without one."""
    if not weighting_settings(config).needs_values:
        return None
    c = config.critic
    return Critic(c.score, c.discount, c.decay, c.coefficient, c.train_trunk)


def optimizer_settings(config: ConfigDict) -> OptimizerSettings:
    """The section `optimizer`, frozen, with the value head's learning rate."""
    return OptimizerSettings(**config.optimizer, value_learning_rate=config.critic.learning_rate)


def peak_learning_rate(config: ConfigDict) -> float:
    """The highest rate that a model's matrices get."""
    muon = config.optimizer.name == "muon"
    return config.optimizer.muon_learning_rate if muon else config.optimizer.learning_rate


def reference_config(config: ConfigDict) -> ConfigDict:
    """The configuration of the reference's own run: its model and steps, unweighted, everything else alike."""
    c = _unweighted(config)
    c.model = config.reference.model.copy_and_resolve_references()
    c.pretrained = defaults().pretrained
    c.train.steps, c.train.epochs = config.reference.steps, 0.0
    if c.eval.stop_metric.startswith("eval/ce_head_"):
        c.eval.stop_metric = "eval/ce_head_0"
    if c.checkpoint.best_metric.startswith("eval/ce_head_"):
        c.checkpoint.best_metric = "eval/ce_head_0"
    return c.lock()


def trunk_config(config: ConfigDict) -> ConfigDict:
    """The configuration of the critic's stage 0: the same model, unweighted, for `critic.trunk_steps`."""
    c = _unweighted(config)
    c.train.steps, c.train.epochs = config.critic.trunk_steps, 0.0
    return c.lock()


def value_config(config: ConfigDict) -> ConfigDict:
    """The configuration of the critic's stage 1: steps, evaluation and early stopping of the value head."""
    c = ConfigDict(config.to_dict())
    c.weighting, c.reference = defaults().weighting, defaults().reference
    c.weighting.algorithm = config.weighting.algorithm
    c.pretrained.trainable = "all"  # the head is all that is trained
    c.critic.head = c.critic.stop_after = ""
    c.train.steps, c.train.epochs = config.critic.steps, 0.0
    c.eval.every, c.eval.patience = config.critic.eval_every, config.critic.patience
    c.eval.stop_metric = c.checkpoint.best_metric = "eval/value_loss"
    # The best head is one that was evaluated.
    c.checkpoint.every = c.eval.every
    return c.lock()


def _unweighted(config: ConfigDict) -> ConfigDict:
    c = ConfigDict(config.to_dict())
    # What has no say in such a run must not keep it from being gone on with.
    for section in ("weighting", "reference", "reward", "critic"):
        c[section] = defaults()[section]
    c.eval.bigram, c.eval.completions, c.eval.token_rows = False, 0, 0
    # A run without values has no value loss to stop by.
    for section, key in ((c.eval, "stop_metric"), (c.checkpoint, "best_metric")):
        if section[key] == "eval/value_loss":
            section[key] = "eval/ce_mean"
    return c
