"""What kind of token each of a packed row is: a row may begin or end within a document, and its neighbours hold the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from wmtp_jax.data.packing import Rows
from wmtp_jax.data.tokenizer import Tokenizer
from wmtp_jax.evaluation.token_kinds import KINDS, byte_kinds, token_kinds

_OTHER = KINDS.index("other")


def row_kinds(rows: Rows, number: int, tokenizer: Tokenizer) -> np.ndarray:
    """The kinds of the tokens of one row, uint8 `[S]`, indices into `KINDS`; `other` in padding and for ends of texts.

    Args:
      rows: of one source, in the order in which they were packed.
      number: which row.
      tokenizer: that made their tokens.
    """
    end = tokenizer.end_of_text_id

    def goes_on(row: int) -> bool:
        return rows.columns["segment_ids"][row, -1] != 0 and rows.columns["tokens"][row, -1] != end

    first, last = number, number
    while first and goes_on(first - 1):
        first -= 1
    while last < len(rows) - 1 and goes_on(last):
        last += 1
    stretch = rows[first : last + 1]
    length, real = stretch["tokens"].shape[1], stretch["segment_ids"].ravel() > 0
    tokens, kinds = stretch["tokens"].ravel()[real], np.full(real.shape, _OTHER, np.uint8)
    kinds[real] = np.concatenate([_document_kinds(tokens[part], tokenizer) for part in _documents(tokens, end)] or [[]])
    return kinds[(number - first) * length :][:length]


def _documents(tokens: np.ndarray, end: int) -> Iterator[slice]:
    ends = [0, *(np.flatnonzero(tokens == end) + 1), len(tokens)]
    return (slice(a, b) for a, b in itertools.pairwise(ends) if b > a)


def _document_kinds(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    pieces = [tokenizer.pieces[token] for token in tokens.tolist()]
    try:
        text = b"".join(pieces).decode()
    except UnicodeDecodeError:  # a prompt of a chat template may be cut off within a character
        return np.full(len(pieces), _OTHER, np.uint8)
    return token_kinds(pieces, byte_kinds(text))
