"""What kind of token each of a packed row is: a row may begin or end within a document, and its neighbours hold the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from wmtp_jax.data.packing import Rows
from wmtp_jax.evaluation.token_kinds import KINDS, byte_kinds, token_kinds
from wmtp_jax.tokenizer.tokenizer import Tokenizer

_OTHER = KINDS.index("other")


def row_kinds(rows: Rows, number: int, tokenizer: Tokenizer) -> np.ndarray:
    """The kinds of the tokens of one row, uint8 `[S]`, indices into `KINDS`; `other` in padding and for ends of texts.

    Args:
      rows: of one source, in the order in which they were packed.
      number: which row.
      tokenizer: that made their tokens.
    """
    end, length = tokenizer.end_of_text_id, rows.columns["tokens"].shape[1]

    def goes_on(row: int) -> bool:
        return rows.columns["segment_ids"][row, -1] != 0 and rows.columns["tokens"][row, -1] != end

    def divided(row: int) -> bool:
        return bool(((rows.columns["tokens"][row] == end) & ~_begins(rows[row : row + 1], tokenizer)[0]).any())

    # As far as the documents reach that this row begins and ends in.
    first, last = number, number
    while first and goes_on(first - 1) and (first == number or not divided(first)):
        first -= 1
    while last < len(rows) - 1 and goes_on(last) and (last == number or not divided(last)):
        last += 1
    stretch = rows[first : last + 1]
    # What begins a segment is no part of its document, and may be the token that ends one.
    real = np.flatnonzero(((stretch["segment_ids"] > 0) & ~_begins(stretch, tokenizer)).ravel())
    tokens, kinds = stretch["tokens"].ravel()[real], np.full(len(stretch["tokens"]) * length, _OTHER, np.uint8)
    start, stop = (number - first) * length, (number - first + 1) * length
    for part in _documents(tokens, end):
        if real[part.start] < stop and real[part.stop - 1] >= start:
            kinds[real[part]] = _document_kinds(tokens[part], tokenizer)
    return kinds[start:stop]


def _begins(rows: dict[str, np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens `[N, S]` begin a segment because every text begins with them."""
    first = np.diff(rows["segment_ids"].astype(np.int64), axis=1, prepend=0) != 0
    return first & (rows["tokens"] == (-1 if tokenizer.begin_of_text_id is None else tokenizer.begin_of_text_id))


def _documents(tokens: np.ndarray, end: int) -> Iterator[slice]:
    ends = [0, *(np.flatnonzero(tokens == end) + 1).tolist(), len(tokens)]
    return (slice(a, b) for a, b in itertools.pairwise(ends) if b > a)


def _document_kinds(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    pieces = [tokenizer.pieces[token] for token in tokens.tolist()]
    try:
        text = b"".join(pieces).decode()
    except UnicodeDecodeError:  # a prompt of a chat template may be cut off within a character
        return np.full(len(pieces), _OTHER, np.uint8)
    return token_kinds(pieces, byte_kinds(text))
