"""Whether what another run left fits this one: its tokenizer, its model, and what its value head was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.pipeline import validation_batches
from wmtp_jax.errors import UserError
from wmtp_jax.pretrained import open_reward_model
from wmtp_jax.run.inputs import tokenizer_of
from wmtp_jax.settings import ModelSettings
from wmtp_jax.storage import s3
from wmtp_jax.tokenizer.tokenizer import load_tokenizer

# How a model computes, not what it is.
_FREE_SETTINGS = ("compute_dtype", "remat", "initial_scale", "lora_rank", "lora_scale")


def check_reference(
    path: str | Path, metadata: dict[str, Any], corpus: Corpus, *, alignment: str, num_heads: int
) -> None:
    """Refuses a reference model that does not fit the data, or the heads that are weighted.

    Args:
      path: where it was trained, or published weights.
      metadata: of its checkpoint.
      corpus: the data of this run.
      alignment: next_token or same_prefix.
      num_heads: H of the model that is weighted.

    Raises:
      UserError: another tokenizer, too few heads for `same_prefix`, or too few learned positions.
    """
    key = f"config.reference.path = {str(path)!r}"
    check_same_tokenizer(path, corpus, key=key)
    model, vocabulary_size = metadata["model"], corpus.tokenizer.vocabulary_size
    # Published weights may have rows that no token has.
    if model["vocabulary_size"] < vocabulary_size:
        raise UserError(
            f"{key}: has a vocabulary of {model['vocabulary_size']}, this run's tokenizer {vocabulary_size}; they must share one"
        )
    if model["positions"] == "learned" and model["max_positions"] < corpus.sequence_length:
        raise UserError(
            f"{key}: has {model['max_positions']} learned positions, fewer than config.data.sequence_length "
            f"({corpus.sequence_length})"
        )
    heads = model["num_heads"]
    if alignment == "same_prefix" and heads < num_heads:
        raise UserError(
            f"{key}: has {heads} heads, and reference.alignment = 'same_prefix' needs model.heads.count ({num_heads}); use "
            "'next_token'"
        )


def check_reward_model(path: str | Path, corpus: Corpus) -> None:
    """Refuses a published sequence classifier that can't score the data.

    Raises:
      UserError: it is none, or of an architecture that is not reproduced, has another tokenizer, or too few learned positions.
    """
    key = f"config.reward.model = {str(path)!r}"
    settings = open_reward_model(path).settings
    check_same_tokenizer(path, corpus, key=key)
    if settings.vocabulary_size < corpus.tokenizer.vocabulary_size:
        raise UserError(
            f"{key}: has a vocabulary of {settings.vocabulary_size}, this run's tokenizer {corpus.tokenizer.vocabulary_size}"
        )
    if settings.positions == "learned" and settings.max_positions < corpus.sequence_length:
        raise UserError(
            f"{key}: has {settings.max_positions} learned positions, fewer than config.data.sequence_length "
            f"({corpus.sequence_length})"
        )


def check_same_tokenizer(path: str | Path, corpus: Corpus, *, key: str) -> None:
    """Refuses a run whose tokenizer gives other ids than the corpus's on samples of the data.

    Args:
      path: the run, or a checkpoint of it, or published weights.
      corpus: the data of this run.
      key: what the message begins with: the setting that names the run.

    Raises:
      UserError: names the first text that differs.
    """
    saved = tokenizer_of(path)
    tokenizer = load_tokenizer(saved)
    rows = next(validation_batches(corpus, batch_size=16, num_heads=1, num_batches=1))["tokens"]
    for text in map(corpus.tokenizer.decode, rows):
        if not np.array_equal(corpus.tokenizer.encode(text), tokenizer.encode(text)):
            raise UserError(
                f"{key}: its tokenizer gives other token ids than this run's, first for {text[:40]!r}; they must share one "
                f"(set config.data.tokenizer to {saved!r})"
            )


def check_trunk(path: str | Path, metadata: dict[str, Any], settings: dict[str, Any], corpus: Corpus) -> None:
    """Refuses a trained model that is not the one that the configuration describes.

    Args:
      path: where it was trained.
      metadata: of its checkpoint.
      settings: the fields of this run's `ModelSettings`.
      corpus: the data of this run.

    Raises:
      UserError: names the first setting that differs, with both values, or the tokenizer.
    """
    key = f"config.critic.trunk = {str(path)!r}"
    _check_settings(key, metadata["model"], settings)
    check_same_tokenizer(path, corpus, key=key)


def check_value_head(
    path: str | Path, metadata: dict[str, Any], settings: dict[str, Any], corpus: Corpus, *, trunk: str
) -> None:
    """Refuses a value head that was not trained on this model's very parameters.

    Args:
      path: where it was trained.
      metadata: of its checkpoint.
      settings: the fields of this run's `ModelSettings`.
      corpus: the data of this run.
      trunk: the hash of this run's trunk.

    Raises:
      UserError: another width, tokenizer or trunk, or no value head at all.
    """
    key = f"config.critic.head = {str(path)!r}"
    if metadata["stage"] != "value":
        raise UserError(f"{key}: is a run of stage {metadata['stage']!r}, not of a value head; give RUN/value")
    _check_settings(key, metadata["model"], settings)
    check_same_tokenizer(path, corpus, key=key)
    if metadata["trunk"] != trunk:
        raise UserError(
            f"{key}: was trained on another trunk ({metadata['trunk'][:12]}, config.critic.trunk is {trunk[:12]}); give the "
            "one it was trained on, or train a head on this one"
        )


def explained_variance(path: str | Path) -> tuple[Path, float]:
    """The best checkpoint of a finished value stage, and the share of the held-out rewards' variance that it explains.

    `path`: its run directory, or a checkpoint of it, which is then taken as it is.

    Raises:
      UserError: the stage did not finish.
    """
    newest = find_checkpoint(path)
    directory = newest.parent.parent
    try:
        facts = json.loads((directory / "summary.json").read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: its value stage did not finish (no summary.json); go on with it first") from error
    if newest == s3.local(path):
        return newest, facts["explained_variance"][newest.name]
    best = str(facts["best_step"])
    # Of a run in object storage, the newest checkpoint alone is fetched.
    where = s3.local(s3.join(path, "checkpoints", best)) if s3.is_remote(path) else newest.parent / best
    return where, facts["explained_variance"][best]


def _check_settings(key: str, have: dict[str, Any], want: dict[str, Any]) -> None:
    # Fields that an older program did not know have their default there.
    known = {**{name: value for name, value in _defaults().items() if name not in have}, **have}
    # Rotary positions have no table: a longer row asks nothing else of the model.
    free = (*_FREE_SETTINGS, "max_positions") if want["positions"] == "rope" else _FREE_SETTINGS
    for name, value in want.items():
        if name not in free and known[name] != value:
            raise UserError(f"{key}: its model has {name} {known[name]!r}, this run's configuration gives {value!r}")


def _defaults() -> dict[str, Any]:
    return {name: field.default for name, field in ModelSettings.__dataclass_fields__.items()}
