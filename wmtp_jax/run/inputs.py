"""What a run is made from besides its data: published weights, and models that other runs left."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.checkpoint.parameters import read_parameters
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.data.corpus import Corpus, load_corpus
from wmtp_jax.errors import UserError
from wmtp_jax.pretrained import Published, open_pretrained
from wmtp_jax.pretrained.gathering import gather
from wmtp_jax.pretrained.locating import is_published, locate
from wmtp_jax.pretrained.published import with_heads
from wmtp_jax.settings import Configuration, ModelSettings
from wmtp_jax.stored.rewards import parameters_key
from wmtp_jax.tokenizer.tokenizer import Tokenizer

# Shapes of parameters by dotted name -> those parameters, one by one, float32.
Start = Callable[[Mapping[str, tuple[int, ...]]], Iterable[tuple[str, np.ndarray]]]

# Rows of an unembedding that no token has are padding, which publishers add to a round number; more than this share of the
# vocabulary is another tokenizer.
_MOST_PADDING = 0.1


def tokenizer_of(path: str | Path) -> str:
    """Where the tokenizer of a model lies, for `load_tokenizer`: a run's, or the one that came with published weights."""
    return str(locate(path)[0] if is_published(path) else find_checkpoint(path).parent.parent / "tokenizer")


def model_key(path: str | Path) -> str:
    """A hash of a model's parameters: of the published files, or of the arrays of a checkpoint."""
    return open_pretrained(path).key if is_published(path) else parameters_key(read_parameters(path)[0])


def load_data(config: Configuration) -> Corpus:
    """The corpus; with published weights, and unless another is named, cut by their tokenizer."""
    c = config.data
    own = c.tokenizer == "bpe" and config.pretrained.path
    return load_corpus(
        c.sources,
        weights=c.source_weights,
        tokenizer=tokenizer_of(config.pretrained.path) if own else c.tokenizer,
        bos=c.bos,
        vocabulary_size=c.vocabulary_size,
        sequence_length=c.sequence_length,
        validation_fraction=c.validation_fraction,
        cache_dir=c.cache_dir,
        label_field=c.label_field,
        failed_in_loss=c.failed_in_loss,
    )


# ---- published weights as the start of a training ----------------------------------------------------------------------


def with_published_trunk(config: Configuration) -> Configuration:
    """The configuration in which a `critic.trunk` of published weights is what it is short for: `pretrained.path`, and no
    stage that trains a trunk first.

    Raises:
      UserError: `pretrained.path` names others.
    """
    trunk = config.critic.trunk
    if not config.weighting.needs_values or not trunk or not is_published(trunk):
        return config
    if config.pretrained.path not in ("", trunk):
        raise UserError(
            f"config.critic.trunk = {trunk!r} and config.pretrained.path = {config.pretrained.path!r}: both are published "
            "weights; give one of them"
        )
    return dataclasses.replace(
        config,
        pretrained=dataclasses.replace(config.pretrained, path=trunk),
        critic=dataclasses.replace(config.critic, trunk="", trunk_steps=0),
    )


def open_base(config: Configuration) -> Published | None:
    """The published weights that training starts from; None where it starts from random ones."""
    return open_pretrained(config.pretrained.path) if config.pretrained.path else None


def base_settings(base: Published, config: Configuration) -> ModelSettings:
    """The published model with the heads of the configuration, computed as it says.

    Raises:
      UserError: heads that the weights can't have, or rows that are longer than the learned positions.
    """
    model, published = config.model, base.settings
    settings = with_heads(published, num_heads=model.heads.count, head_kind=model.heads.kind, where=base.path)
    if published.positions == "learned" and published.max_positions < config.data.sequence_length:
        raise UserError(
            f"config.data.sequence_length = {config.data.sequence_length}: {base.path} has {published.max_positions} learned "
            "positions; give at most so many"
        )
    return dataclasses.replace(settings, compute_dtype=model.compute_dtype, remat=model.remat)


def start_of(base: Published, config: Configuration) -> tuple[Start, str]:
    """The published parameters with new heads, and their key."""
    heads = {"num_heads": config.model.heads.count, "head_kind": config.model.heads.kind}
    return functools.partial(gather, base, **heads), f"{base.key}:{heads['num_heads']}:{heads['head_kind']}"


def describe_base(base: Published) -> dict[str, Any]:
    """What every checkpoint says of the published weights that it came from, as JSON values.

    Returns:
      `path`, `revision` (the hub's commit, or ""), `format` (transformers | gguf | meta), `family`, `key` (a hash of the
      files), `config` (config.json, params.json, or a GGUF file's scalars) and `generation_config` (see `Published`).
    """
    about = {"path": str(base.path), "revision": base.revision, "format": base.format, "family": base.family}
    plain = json.loads(json.dumps(base.config))
    return {**about, "key": base.key, "config": plain, "generation_config": base.generation_config}


def end_tokens(origin: Mapping[str, Any], vocabulary_size: int) -> tuple[int, ...]:
    """The tokens at which the publisher of a model has generation stop: of generation_config.json, else of config.json.

    Args:
      origin: as `describe_base` gives it, or {}.
      vocabulary_size: ids past it are never sampled, and left out.

    Raises:
      UserError: `eos_token_id` is neither an id nor a list of ids.
    """
    for name in ("generation_config", "config"):
        ends = (origin.get(name) or {}).get("eos_token_id")
        if ends is None:
            continue
        ends = ends if isinstance(ends, list) else [ends]
        if any(type(index) is not int for index in ends):
            raise UserError(f"{origin['path']}: eos_token_id of its {name} = {ends!r}: must be a token id, or a list of them")
        return tuple(index for index in ends if 0 <= index < vocabulary_size)
    return ()


def check_vocabulary(base: Published, tokenizer: Tokenizer, *, key: str) -> None:
    """Refuses a tokenizer that is not the weights': more tokens than they have, or far fewer.

    Args:
      base: published weights.
      tokenizer: what texts are cut with.
      key: what the message begins with.

    Raises:
      UserError: names both sizes.
    """
    rows, tokens = base.settings.vocabulary_size, tokenizer.vocabulary_size
    if tokens > rows or rows - tokens > _MOST_PADDING * rows:
        raise UserError(
            f"{key}: {base.path} has a vocabulary of {rows}, the tokenizer one of {tokens}; give weights and tokenizer that "
            "belong together" + (" (config.data.tokenizer names another tokenizer)" if key.startswith("config.") else "")
        )
