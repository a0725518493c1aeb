"""What a configuration may hold: every value is checked, and one that can't be is refused by its key."""

from __future__ import annotations

import math
from typing import Any

from ml_collections import ConfigDict

from wmtp_jax.config import (
    ALGORITHMS,
    HEAD_KINDS,
    HYBRID_MEMBERS,
    REFERENCE_SCORES,
    REWARD_SOURCES,
    SCOPES,
    SCORE_FORMS,
    SCORED_ALGORITHMS,
    SINGLE_METRICS,
    TRAINABLE,
    defaults,
    flatten,
    uses_reference,
)
from wmtp_jax.errors import UserError
from wmtp_jax.parallel.processes import refuse_several
from wmtp_jax.storage.s3 import is_remote


def check(config: ConfigDict) -> None:
    """See `config.validate`."""
    _check_keys(config, defaults())
    _check_model(config.model, "model.")
    _check_weighting(config)
    _check_reference(config)
    _check_pretrained(config)
    _check_critic(config)
    _check_run(config)
    _check_mesh(config.mesh)
    _check_outputs(config)


def check_one_device(config: ConfigDict) -> None:
    """Refuses several processes, and a mesh of several devices, for a backend that trains on one."""
    refuse_several("the torch backend trains in one")
    if config.train.profile:
        _refuse("train.profile", config.train.profile, "() with the torch backend: it is jax's profiler")
    for axis, size in config.mesh.items():
        # All that is there is one device; but to ask for parameters in parts is to ask for what fits no single one.
        if size > 1 or (size == -1 and axis != "data"):
            raise UserError(
                f"config.mesh.{axis} = {size}: the torch backend trains on one device; set it to 1, or train with wmtp_jax.main"
            )


def _refuse(key: str, value: Any, must: str) -> None:
    raise UserError(f"config.{key} = {value!r}: must be {must}")


def _check_keys(config: ConfigDict, reference: ConfigDict) -> None:
    """Same keys and types as the defaults: a recipe may have unlocked the tree, or replaced a part of it."""
    have, want = dict(flatten(config)), dict(flatten(reference))
    for key in have:
        if key not in want:
            raise UserError(f"config.{key}: unknown key; every key is declared in wmtp_jax/config.py")
    for key, default in want.items():
        if key not in have:
            raise UserError(f"config.{key}: missing; start a recipe from wmtp_jax.config.defaults()")
        value = have[key]
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            continue
        if type(value) is not type(default):
            _refuse(key, value, f"a {type(default).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(key, value, "finite")


def _check_model(c: ConfigDict, prefix: str) -> None:
    for key in ("width", "layers", "attention_heads"):
        if c[key] < 1:
            _refuse(prefix + key, c[key], "at least 1")
    for key in ("kv_heads", "head_dim", "mlp_width", "max_positions"):
        if c[key] < 0:
            _refuse(prefix + key, c[key], "0 or more")
    if c.head_dim == 0 and c.width % c.attention_heads:
        _refuse(prefix + "width", c.width, f"a multiple of attention_heads ({c.attention_heads}), or set head_dim")
    if c.kv_heads and c.attention_heads % c.kv_heads:
        _refuse(prefix + "kv_heads", c.kv_heads, f"a divisor of attention_heads ({c.attention_heads})")
    if c.positions == "rope" and (c.head_dim or c.width // c.attention_heads) % 2:
        _refuse(prefix + "head_dim", c.head_dim or c.width // c.attention_heads, "even where positions = 'rope'")
    choices = {
        "activation": ("swiglu", "gelu"),
        "norm": ("rmsnorm", "layernorm"),
        "positions": ("rope", "learned"),
        "compute_dtype": ("float32", "bfloat16"),
        "remat": ("none", "layer", "dots"),
    }
    for key, allowed in choices.items():
        if c[key] not in allowed:
            _refuse(prefix + key, c[key], " | ".join(allowed))
    for key in ("norm_epsilon", "rope_theta", "initial_scale"):
        if c[key] <= 0:
            _refuse(prefix + key, c[key], "above 0")
    if c.heads.count < 1:
        _refuse(prefix + "heads.count", c.heads.count, "at least 1")
    if c.heads.kind not in HEAD_KINDS:
        _refuse(prefix + "heads.kind", c.heads.kind, " | ".join(HEAD_KINDS))


def _check_weighting(config: ConfigDict) -> None:
    c = config.weighting
    if c.algorithm not in ALGORITHMS:
        _refuse("weighting.algorithm", c.algorithm, " | ".join(ALGORITHMS))
    if c.form not in SCORE_FORMS:
        _refuse("weighting.form", c.form, " | ".join(SCORE_FORMS))
    if c.form != "default" and c.algorithm not in SCORED_ALGORITHMS:
        _refuse("weighting.form", c.form, f"'default' for {c.algorithm}: it makes its weights without a score")
    if c.score not in REFERENCE_SCORES:
        _refuse("weighting.score", c.score, " | ".join(REFERENCE_SCORES))
    if c.score != "excess_loss":
        _check_reference_score(c)
    if c.scope not in SCOPES:
        _refuse("weighting.scope", c.scope, " | ".join(SCOPES))
    if not 0 < c.fraction <= 1 or abs(c.fraction * 1000 - round(c.fraction * 1000)) > 1e-9:
        _refuse("weighting.fraction", c.fraction, "in (0, 1], in whole thousandths")
    for key in ("temperature", "softmax_temperature", "high", "decay"):
        if c[key] <= 0:
            _refuse(f"weighting.{key}", c[key], "above 0")
    for key in ("low", "threshold", "gamma", "start_step"):
        if c[key] < 0:
            _refuse(f"weighting.{key}", c[key], "0 or more")
    if c.low > c.high:
        _refuse("weighting.low", c.low, f"at most weighting.high ({c.high})")
    if len(c.members) != len(c.coefficients) or not c.members:
        _refuse("weighting.coefficients", c.coefficients, f"one number for each of weighting.members {c.members}")
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 <= x < math.inf for x in c.coefficients):
        _refuse("weighting.coefficients", c.coefficients, "finite numbers of 0 or more")
    for member in c.members:
        if member not in HYBRID_MEMBERS:
            _refuse("weighting.members", member, " | ".join(HYBRID_MEMBERS))
    if config.weighting.scope == "position" and config.model.heads.count == 1 and c.algorithm != "baseline-mtp":
        _refuse("weighting.scope", c.scope, "sequence, batch or head where model.heads.count is 1: one head has nothing to share")


def _check_reference_score(c: ConfigDict) -> None:
    if ALGORITHMS[c.algorithm] != "reference":
        _refuse("weighting.score", c.score, f"'excess_loss' for {c.algorithm}: it asks no reference")
    if c.score == "reference_both" and c.form != "top_fraction" and (c.form, c.algorithm) != ("default", "rho1-tokenskip"):
        must = "another than reference_both unless the form is top_fraction: it is what two such choices both keep"
        _refuse("weighting.score", c.score, must + " (rho1-tokenskip, or config.weighting.form=top_fraction)")
    for key, value in (("signed", True), ("threshold", 0.0)):
        if c[key] != value:
            _refuse(f"weighting.{key}", c[key], f"{value} where weighting.score = {c.score!r}: it belongs to excess_loss")


def _check_reference(config: ConfigDict) -> None:
    c = config.reference
    if c.alignment not in ("next_token", "same_prefix"):
        _refuse("reference.alignment", c.alignment, "next_token | same_prefix")
    if c.steps < 0:
        _refuse("reference.steps", c.steps, "0 or more")
    if not c.losses:
        _refuse("reference.losses", c.losses, "auto, step or a directory of stored losses")
    if c.losses not in ("auto", "step") and c.alignment == "same_prefix":
        _refuse("reference.losses", c.losses, "step where reference.alignment = 'same_prefix': one loss a token is stored")
    if not uses_reference(config):
        return
    if not c.path and not c.steps:
        why = " with reward.source = 'likelihood'" if config.weighting.algorithm == "critic-wmtp" else ""
        raise UserError(
            f"config.weighting.algorithm = {config.weighting.algorithm!r}{why} needs a reference model: set "
            "config.reference.path to a trained run, or config.reference.steps to train one first"
        )
    if not c.path:
        _check_model(c.model, "reference.model.")
        if c.model.positions == "learned" and 0 < c.model.max_positions < config.data.sequence_length:
            _refuse(
                "reference.model.max_positions", c.model.max_positions,
                f"at least data.sequence_length ({config.data.sequence_length}), or 0",
            )  # fmt: skip
        weights = ALGORITHMS[config.weighting.algorithm] == "reference"
        if weights and c.alignment == "same_prefix" and c.model.heads.count < config.model.heads.count:
            _refuse(
                "reference.model.heads.count", c.model.heads.count,
                f"at least model.heads.count ({config.model.heads.count}) where reference.alignment = 'same_prefix'",
            )  # fmt: skip


def _check_pretrained(config: ConfigDict) -> None:
    c = config.pretrained
    if c.trainable not in TRAINABLE:
        _refuse("pretrained.trainable", c.trainable, " | ".join(TRAINABLE))
    if c.lora_rank < 1:
        _refuse("pretrained.lora_rank", c.lora_rank, "at least 1")
    if c.lora_alpha <= 0:
        _refuse("pretrained.lora_alpha", c.lora_alpha, "above 0")
    if c.trainable == "all":
        return
    trunk = config.critic.trunk if config.weighting.algorithm == "critic-wmtp" else ""
    if not c.path and not trunk:
        _refuse("pretrained.trainable", c.trainable, "'all' without config.pretrained.path: random weights have to be trained")
    if c.trainable == "heads" and config.model.heads.count == 1:
        _refuse("pretrained.trainable", c.trainable, "all or lora where model.heads.count is 1: there is no new head to train")


def _check_critic(config: ConfigDict) -> None:
    c = config.critic
    if config.reward.source not in REWARD_SOURCES:
        _refuse("reward.source", config.reward.source, " | ".join(REWARD_SOURCES))
    choices = {"score": ("value_change", "advantage"), "stop_after": ("", "trunk", "value")}
    for key, allowed in choices.items():
        if c[key] not in allowed:
            _refuse(f"critic.{key}", c[key], " | ".join(map(repr, allowed)))
    for key in ("trunk_steps", "coefficient"):
        if c[key] < 0:
            _refuse(f"critic.{key}", c[key], "0 or more")
    for key in ("discount", "decay"):
        if not 0 <= c[key] <= 1:
            _refuse(f"critic.{key}", c[key], "in [0, 1]")
    for key in ("steps", "eval_every", "patience"):
        if c[key] < 1:
            _refuse(f"critic.{key}", c[key], "at least 1")
    if c.learning_rate <= 0:
        _refuse("critic.learning_rate", c.learning_rate, "above 0")
    if ALGORITHMS[config.weighting.algorithm] != "values":
        return
    if not c.trunk and not c.trunk_steps and not config.pretrained.path:
        raise UserError(
            "config.weighting.algorithm = 'critic-wmtp' starts from a trained model: set config.critic.trunk to a trained "
            "run or published weights, or config.critic.trunk_steps to train a baseline-mtp run first"
        )
    if c.head and not c.trunk and (c.trunk_steps or not config.pretrained.path):
        raise UserError(f"config.critic.head = {c.head!r}: belongs to the model it was trained on; set config.critic.trunk to it")
    if config.reward.source == "reward_model" and not config.reward.model:
        _refuse("reward.model", config.reward.model, "a directory or MODULE:FUNCTION where reward.source = 'reward_model'")


def _check_run(config: ConfigDict) -> None:
    data, train, optimizer = config.data, config.train, config.optimizer
    if not data.sources:
        _refuse("data.sources", data.sources, "at least one of python-stdlib, text:GLOB, jsonl:PATH, tfds:NAME")
    if data.source_weights and len(data.source_weights) != len(data.sources):
        _refuse("data.source_weights", data.source_weights, f"one weight for each of {len(data.sources)} sources, or ()")
    if any(isinstance(w, bool) or not isinstance(w, (int, float)) or not 0 < w < math.inf for w in data.source_weights):
        _refuse("data.source_weights", data.source_weights, "finite numbers above 0")
    if not 0 < data.validation_fraction < 1:
        _refuse("data.validation_fraction", data.validation_fraction, "between 0 and 1")
    if data.sequence_length <= config.model.heads.count:
        _refuse("data.sequence_length", data.sequence_length, f"above model.heads.count ({config.model.heads.count})")
    if data.tokenizer == "bpe" and data.vocabulary_size < 257:
        _refuse("data.vocabulary_size", data.vocabulary_size, "at least 257 (256 bytes and the end of text)")
    if data.prefetch < 0:
        _refuse("data.prefetch", data.prefetch, "0 or more")
    max_positions = config.model.max_positions
    if config.model.positions == "learned" and 0 < max_positions < data.sequence_length:
        _refuse("model.max_positions", max_positions, f"at least data.sequence_length ({data.sequence_length}), or 0")
    if (train.steps > 0) == (train.epochs > 0) or train.steps < 0 or train.epochs < 0:
        raise UserError("config.train.steps and config.train.epochs: exactly one must be above 0, the other 0")
    for key in ("batch_size", "accumulation", "log_every"):
        if train[key] < 1:
            _refuse(f"train.{key}", train[key], "at least 1")
    if train.batch_size % train.accumulation:
        _refuse("train.accumulation", train.accumulation, f"a divisor of train.batch_size ({train.batch_size})")
    steps = train.profile
    if steps and (len(steps) != 2 or any(type(step) is not int for step in steps) or not 1 <= steps[0] <= steps[1]):
        _refuse("train.profile", steps, "() or (first, last), updates counted from 1")
    for key in ("seed", "loss_chunk", "nonfinite_limit"):
        if train[key] < 0:
            _refuse(f"train.{key}", train[key], "0 or more")
    if train.seed >= 2**31:
        _refuse("train.seed", train.seed, "below 2^31")
    if optimizer.name not in ("adamw", "muon"):
        _refuse("optimizer.name", optimizer.name, "adamw | muon")
    if optimizer.schedule not in ("cosine", "wsd", "constant"):
        _refuse("optimizer.schedule", optimizer.schedule, "cosine | wsd | constant")
    for key in ("learning_rate", "muon_learning_rate", "epsilon"):
        if optimizer[key] <= 0:
            _refuse(f"optimizer.{key}", optimizer[key], "above 0")
    for key in ("b1", "b2"):
        if not 0 <= optimizer[key] < 1:
            _refuse(f"optimizer.{key}", optimizer[key], "in [0, 1)")
    for key in ("decay_fraction", "final_fraction"):
        if not 0 <= optimizer[key] <= 1:
            _refuse(f"optimizer.{key}", optimizer[key], "in [0, 1]")
    for key in ("weight_decay", "clip_norm", "warmup_steps"):
        if optimizer[key] < 0:
            _refuse(f"optimizer.{key}", optimizer[key], "0 or more")


def _check_mesh(c: ConfigDict) -> None:
    for axis, size in c.items():
        if size != -1 and size < 1:
            _refuse(f"mesh.{axis}", size, "1 or more devices, or -1 for those that the other axes leave")
    rest = [axis for axis, size in c.items() if size == -1]
    if len(rest) > 1:
        _refuse(f"mesh.{rest[1]}", -1, f"1 or more devices where config.mesh.{rest[0]} is -1: one axis gets the rest")


def _check_outputs(config: ConfigDict) -> None:
    evaluation, checkpoint = config.eval, config.checkpoint
    metrics = SINGLE_METRICS + tuple(f"eval/ce_head_{k}" for k in range(config.model.heads.count))
    if config.weighting.algorithm == "critic-wmtp":
        metrics += ("eval/value_loss",)
    for key, value in (("eval.stop_metric", evaluation.stop_metric), ("checkpoint.best_metric", checkpoint.best_metric)):
        if value and value not in metrics:
            _refuse(key, value, "'' or one of " + ", ".join(metrics))
    for key in ("every", "token_rows", "completions"):
        if evaluation[key] < 0:
            _refuse(f"eval.{key}", evaluation[key], "0 or more")
    for key in ("batches", "patience", "completion_tokens"):
        if evaluation[key] < 1:
            _refuse(f"eval.{key}", evaluation[key], "at least 1")
    if evaluation.completion_temperature < 0:
        _refuse("eval.completion_temperature", evaluation.completion_temperature, "0 or more")
    if checkpoint.every < 0:
        _refuse("checkpoint.every", checkpoint.every, "0 or more")
    if not 0 <= checkpoint.wait_seconds <= 1e6:
        _refuse("checkpoint.wait_seconds", checkpoint.wait_seconds, "in [0, 1000000]")
    if checkpoint.remote and not is_remote(checkpoint.remote):
        _refuse("checkpoint.remote", checkpoint.remote, "'' or s3://BUCKET/PREFIX")
    if checkpoint.keep_last < 1:
        _refuse("checkpoint.keep_last", checkpoint.keep_last, "at least 1")
    tracking = config.tracking
    if "://" in tracking.artifacts and not is_remote(tracking.artifacts):
        _refuse("tracking.artifacts", tracking.artifacts, "'', a directory or s3://BUCKET/PREFIX")
    if tracking.system_seconds < 0:
        _refuse("tracking.system_seconds", tracking.system_seconds, "0 or more")
    for key in ("sweep", "model"):
        if set(tracking[key]) & set("'\"/:"):
            _refuse(f"tracking.{key}", tracking[key], "a name without quotes, / and :")
