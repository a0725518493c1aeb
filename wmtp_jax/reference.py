"""A trained run as the reference model of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wmtp_jax.checkpoint import find_checkpoint, load_model
from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.pipeline import validation_batches
from wmtp_jax.data.tokenizer import load_tokenizer
from wmtp_jax.errors import UserError
from wmtp_jax.train_step import Reference


def load_reference(path: str | Path, corpus: Corpus, *, alignment: str, num_heads: int) -> Reference:
    """The reference model of a run directory or checkpoint, after checking that it fits the data and the heads.

    Args:
      path: where it was trained.
      corpus: the data of this run.
      alignment: next_token or same_prefix.
      num_heads: H of the model that is weighted.

    Raises:
      UserError: another tokenizer, too few heads for `same_prefix`, or no checkpoint there.
    """
    definition, parameters, metadata = load_model(path)
    check_same_tokenizer(path, corpus)
    model, vocabulary_size = metadata["model"], corpus.tokenizer.vocabulary_size
    if model["vocabulary_size"] != vocabulary_size:
        raise UserError(
            f"config.reference.path = {str(path)!r}: has a vocabulary of {model['vocabulary_size']}, this run's tokenizer "
            f"{vocabulary_size}; they must share one"
        )
    if model["positions"] == "learned" and model["max_positions"] < corpus.sequence_length:
        raise UserError(
            f"config.reference.path = {str(path)!r}: has {model['max_positions']} learned positions, fewer than "
            f"config.data.sequence_length ({corpus.sequence_length})"
        )
    heads = model["num_heads"]
    if alignment == "same_prefix" and heads < num_heads:
        raise UserError(
            f"config.reference.path = {str(path)!r}: has {heads} heads, and reference.alignment = 'same_prefix' needs "
            f"model.heads.count ({num_heads}); use 'next_token'"
        )
    return Reference(definition, parameters)


def check_same_tokenizer(path: str | Path, corpus: Corpus) -> None:
    """Refuses a run whose tokenizer gives other ids than the corpus's on samples of the data.

    Raises:
      UserError: names the first text that differs.
    """
    saved = find_checkpoint(path).parent.parent / "tokenizer"
    tokenizer = load_tokenizer(saved)
    rows = next(validation_batches(corpus, batch_size=16, num_heads=1, num_batches=1))["tokens"]
    for text in map(corpus.tokenizer.decode, rows):
        if not np.array_equal(corpus.tokenizer.encode(text), tokenizer.encode(text)):
            raise UserError(
                f"config.reference.path = {str(path)!r}: its tokenizer gives other token ids than this run's, first for "
                f"{text[:40]!r}; they must share one (set config.data.tokenizer to {str(saved)!r})"
            )
