"""One source's documents to rows on disk: cut into tokens, with what may be a target and what is known about each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from wmtp_jax.data import packing
from wmtp_jax.data.documents import Document
from wmtp_jax.data.scan import SPLITS
from wmtp_jax.errors import UserError
from wmtp_jax.storage.long_work import LongWork
from wmtp_jax.tokenizer.tokenizer import Part, Tokenizer


class SourcePacker:
    """Tokenises one source's documents and writes their rows."""

    def __init__(self, tokenizer: Tokenizer, sequence_length: int, scratch: Path, *, failed_in_loss: bool):
        self._tokenizer, self._sequence_length = tokenizer, sequence_length
        self._failed_in_loss = failed_in_loss
        self._dtypes = packing.column_dtypes(sequence_length=sequence_length, vocabulary_size=tokenizer.vocabulary_size)
        self._stores = {side: packing.TokenStore(scratch, self._dtypes["tokens"]) for side in SPLITS}
        self._sizes = dict.fromkeys(SPLITS, 0)
        self._linked = True
        self.targets = dict.fromkeys(SPLITS, 0)  # tokens that may be targets
        self.too_long: list[int] = []  # tokens of each document that is longer than a row

    def add(self, batch: list[tuple[str, bool, Document]]) -> None:
        """Takes documents, each with its side and whether it is of the same problem as the one before it."""
        encoded = encode_documents(self._tokenizer, [document for _, _, document in batch])
        packable: dict[str, list[packing.Packable]] = {side: [] for side in SPLITS}
        for (side, joined, document), (ids, allowed) in zip(batch, encoded, strict=True):
            joined &= self._linked
            whole = bool(document.parts)
            if whole and len(ids) > self._sequence_length:
                self.too_long.append(len(ids))
                self._linked = joined  # else the next one would join another problem
                continue
            self._linked = True
            if document.label is False and not self._failed_in_loss:
                allowed = np.zeros_like(allowed)
            label = np.nan if document.label is None else float(document.label)
            packable[side].append(packing.Packable(ids, allowed, label, joined, whole))
            self._sizes[side] += len(document.text.encode())
            self.targets[side] += int(allowed.sum())
        for side, store in self._stores.items():
            store.append(packable[side])

    def check(self, name: str) -> None:
        """Refuses a source of which nothing is left to train on, as its texts are too long."""
        if not self._stores["train"].documents and self.too_long:
            raise UserError(too_long_message(f"all training documents of {name}", self._sequence_length, self.too_long))

    def write(
        self, name: str, columns: list[str], paths_of: Callable[[str], Callable[[str], Path]]
    ) -> dict[str, dict[str, int]]:
        """Writes the rows of each side of the source `name`; returns their counts."""
        counts = {}
        for side, store in self._stores.items():
            with LongWork(f"packing {name} ({side})", total=store.tokens / 1e6, unit="million tokens") as work:
                documents = _counted(store.shuffled(), work)
                begin = self._tokenizer.begin_of_text_id
                rows = packing.write_columns(
                    paths_of(side),
                    packing.pack(documents, sequence_length=self._sequence_length, begin=begin),
                    dtypes={column: self._dtypes[column] for column in columns},
                    sequence_length=self._sequence_length,
                )
            size = self._sizes[side]
            counts[side] = {"documents": store.documents, "tokens": store.tokens, "bytes": size, "rows": rows}
            store.close()
        return counts


def _counted(documents: Iterable[packing.Packable], work: LongWork) -> Iterator[packing.Packable]:
    for document in documents:
        yield document
        work.done += len(document.tokens) / 1e6


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids int32 `[n]` of documents, with the tokens that begin and end a text, and whether each may be a target, bool
    `[n]`."""
    encoded = tokenizer.encode_parts([document.parts or (Part(document.text, True),) for document in documents])
    complete = []
    for document, (ids, allowed) in zip(documents, encoded, strict=True):
        if not document.parts or not _ends_itself(ids, tokenizer):
            ids = np.append(ids, tokenizer.end_of_text_id)
            allowed = np.append(allowed, document.parts[-1].target if document.parts else True)
        begun = tokenizer.begin(ids)
        complete.append((begun, np.pad(allowed, (len(begun) - len(ids), 0))))
    return complete


def _ends_itself(ids: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether a chat template has ended the text, by an end-of-text token that only white space follows."""
    ends = np.flatnonzero(ids == tokenizer.end_of_text_id)
    return bool(ends.size) and not b"".join(tokenizer.pieces[token] for token in ids[ends[-1] + 1 :]).strip()


def too_long_message(what: str, sequence_length: int, sizes: list[int]) -> str:
    """What to tell where no document fits a row; `sizes` are their tokens."""
    return (
        f"config.data.sequence_length = {sequence_length}: {what} are longer than a row (prompts and completions are not "
        f"cut); the shortest of them has {min(sizes)} tokens"
    )
