"""Held-out documents in windows of tokens, the same for every model of a tokenizer."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from wmtp_jax.data.chat import Chat
from wmtp_jax.data.documents import Document, digest_of
from wmtp_jax.data.packer import encode_documents
from wmtp_jax.data.packing import cut
from wmtp_jax.data.scan import DROPPED, kept_documents, read_documents, scan
from wmtp_jax.data.sources import open_source
from wmtp_jax.errors import UserError
from wmtp_jax.evaluation.token_kinds import KINDS, byte_kinds, token_kinds
from wmtp_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Windows:
    """N windows of S tokens, each a piece of one document.

    Attributes:
      tokens, segment_ids: int32 `[N, S]`; segment 0 is padding.
      kinds: int32 `[N, S]`, of every token, an index into `token_kinds.KINDS`.
      loss_mask: bool `[N, S]`, which may be targets: no prompt, no padding.
      documents: how many.
      data_hash: SHA-256 of the documents' digests.
      source: what they came from, for the results.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    kinds: np.ndarray
    loss_mask: np.ndarray
    documents: int
    data_hash: str
    source: str


def held_out(
    sources: Sequence[str], fraction: float, tokenizer: Tokenizer, *, label_field: str
) -> Iterator[tuple[bytes, Document]]:
    """The validation documents of a run's sources, as training splits them, each once, after its digest. Wrong solutions are
    left out.

    Raises:
      UserError: a source that is not there.
    """
    opened = [open_source(name, label_field=label_field, chat=Chat(tokenizer)) for name in sources]
    with TemporaryDirectory() as scratch:
        found = scan(opened, validation_fraction=fraction, sample_bytes=0, scratch=Path(scratch))
        for number, source in enumerate(opened):
            for side, _, document in kept_documents(source, number, found):
                if side == "validation" and document.label is not False:
                    yield digest_of(document), document


def everything(source: str, tokenizer: Tokenizer) -> Iterator[tuple[bytes, Document]]:
    """Every document of a source that the user names, after its digest.

    Raises:
      UserError: a source that is not there.
    """
    opened = open_source(source, chat=Chat(tokenizer))
    for document in read_documents(opened, dict.fromkeys(DROPPED, 0), lambda file_hash: None):
        yield digest_of(document), document


def make_windows(
    documents: Iterable[tuple[bytes, Document]], tokenizer: Tokenizer, *, length: int, limit: int | None, source: str
) -> Windows:
    """Cuts documents into windows of `length` tokens that follow each other.

    Args:
      documents: each after its digest.
      tokenizer: an end-of-text token ends each document; the token that begins a text, if there is one, begins each window.
      length: S.
      limit: so many documents, those of the smallest digests, which is a sample that no order of files decides.
      source: what the results call it.

    Raises:
      UserError: no document.
    """
    chosen = list(documents) if limit is None else heapq.nsmallest(limit, documents, key=lambda pair: pair[0])
    rows, digest = [], hashlib.sha256()
    for one, document in chosen:
        digest.update(one)
        [(tokens, targets)] = encode_documents(tokenizer, [document])
        kinds = token_kinds([tokenizer.pieces[token] for token in tokens], byte_kinds(document.text))
        columns = np.stack([tokens, np.ones_like(tokens), kinds, targets]).astype(np.int32)
        begin = tokenizer.begin_of_text_id
        for part, lacks in cut(tokens, room=length, length=length, begin=begin):
            opening = np.array([[begin], [1], [KINDS.index("other")], [0]]) if lacks else columns[:, :0]
            rows.append(np.concatenate([opening, columns[:, part]], axis=1))
    if not rows:
        raise UserError(f"{source}: no document to evaluate on; name others with --data")
    columns = np.zeros((4, len(rows), length), np.int32)
    for place, row in enumerate(rows):
        columns[:, place, : row.shape[1]] = row
    tokens, segment_ids, kinds, targets = columns
    return Windows(tokens, segment_ids, kinds, targets > 0, len(chosen), digest.hexdigest(), source)
