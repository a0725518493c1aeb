"""The first pass over the sources: every document checked, counted, hashed, and given to training or validation."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np

from wmtp_jax.data.documents import Document, digest_of
from wmtp_jax.data.sources import Source
from wmtp_jax.errors import UserError

SPLITS = ("train", "validation")
DROPPED = ("duplicate", "empty", "undecodable")

_HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("source", "<u4"), ("validation", "?")])
# joined: of the same problem as the document before it.
_RECORD = np.dtype([*_HASHED.descr, ("joined", "?")])
_RECORDS_AT_ONCE = 1 << 16
# Duplicates are looked for among so many records at a time, split by hash: 140 MB.
_RECORDS_SORTED_AT_ONCE = 1 << 21
_SAMPLE_CHARACTERS_OF_ONE = 1 << 20


@dataclass
class Scan:
    """What the first pass learned.

    Attributes:
      records: one entry a document, in the order of the sources, on disk.
      keep: bool `[documents]`, False for the second and later copies of a text, over all sources.
      file_hashes: for each source, the content hash of each of its files.
      dropped: for each source, how many documents were left out, by reason.
      content_hash: of the documents that are kept, the side that each is on, and which of them stay together.
      sample: texts of the training side, about `sample_bytes`, drawn by hash.
      traits: for each source, what its documents have.
    """

    records: np.ndarray
    keep: np.ndarray
    file_hashes: list[list[str]]
    dropped: list[dict[str, int]]
    content_hash: str
    sample: list[str]
    traits: list[Traits]


@dataclass
class Traits:
    """What some document of a source has.

    Attributes:
      parts: pieces of which not all may be targets, so that it must stay whole.
      failed: the label False.
      labelled: any label.
    """

    parts: bool = False
    failed: bool = False
    labelled: bool = False

    def note(self, document: Document) -> None:
        """Adds a document."""
        self.parts |= bool(document.parts)
        self.failed |= document.label is False
        self.labelled |= document.label is not None


def is_validation(identity: bytes, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its identity alone, so that a file or a problem never changes sides."""
    digest = hashlib.blake2b(identity, digest_size=8, person=b"wmtp split").digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def read_documents(source: Source, dropped: dict[str, int], on_file: Callable[[str], None]) -> Iterator[Document]:
    """The documents of a source that hold text.

    Args:
      dropped: counts of those left out, added to.
      on_file: called with the content hash of each file after its last document.
    """
    for file in source.files:
        digest = hashlib.blake2b(digest_size=16)
        for document in source.read(file, digest):
            if document is None:
                dropped["undecodable"] += 1
            elif not document.text.strip():
                dropped["empty"] += 1
            else:
                yield document
        on_file(digest.hexdigest())


def scan(sources: Sequence[Source], *, validation_fraction: float, sample_bytes: int, scratch: Path) -> Scan:
    """Reads every document once; writes nothing but an unnamed file in `scratch`.

    Memory does not grow with the corpus but for one byte a document and the list of files.

    Raises:
      UserError: content that is no document, a source without one, or without one for training; none for validation.
    """
    sampler = _Sampler(sample_bytes)
    file_hashes: list[list[str]] = [[] for _ in sources]
    dropped = [dict.fromkeys(DROPPED, 0) for _ in sources]
    traits = [Traits() for _ in sources]
    with TemporaryFile(dir=scratch) as file:
        writer = _RecordWriter(file)
        for number, source in enumerate(sources):
            problem = ("", "")
            for document in read_documents(source, dropped[number], file_hashes[number].append):
                digest = digest_of(document)
                identity = os.fsencode(document.identity) or digest
                held_out = document.side == "validation"
                if not document.side:
                    held_out = is_validation(identity, validation_fraction)
                high, low = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
                if not held_out:
                    sampler.offer(high, writer.count, document.text)
                before, problem = problem, (document.identity, document.side)
                writer.write((high, low, number, held_out, document.identity != "" and before == problem))
                traits[number].note(document)
        writer.flush()
        # The mapping keeps the unnamed file alive.
        records = np.memmap(file, _RECORD, "r", shape=(writer.count,)) if writer.count else np.zeros(0, _RECORD)
    keep = first_of_each(records)
    content, joined = hashlib.sha256(), hashlib.sha256()
    for start in range(0, len(records), _RECORDS_AT_ONCE):
        part = slice(start, start + _RECORDS_AT_ONCE)
        content.update(records[part][list(_HASHED.names)][keep[part]].astype(_HASHED).tobytes())
        joined.update(records[part]["joined"].tobytes() + keep[part].tobytes())
        copies = np.bincount(records[part]["source"][~keep[part]], minlength=len(sources))
        for number, copy_count in enumerate(copies):
            dropped[number]["duplicate"] += int(copy_count)
    if records["joined"].any():
        content.update(joined.digest())
    result = Scan(records, keep, file_hashes, dropped, content.hexdigest(), sampler.texts(keep), traits)
    _check_sides(sources, result, validation_fraction)
    return result


def first_of_each(records: np.ndarray) -> np.ndarray:
    """bool `[N]`: True for the first record of every (high, low)."""
    keep = np.ones(len(records), bool)
    parts = -(-len(records) // _RECORDS_SORTED_AT_ONCE) or 1
    for part in range(parts):
        chosen = []
        for start in range(0, len(records), _RECORDS_AT_ONCE):
            chosen.append(start + np.flatnonzero(records["high"][start : start + _RECORDS_AT_ONCE] % parts == part))
        index = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
        high, low = records["high"][index], records["low"][index]
        order = np.lexsort((index, low, high))
        high, low, index = high[order], low[order], index[order]
        keep[index[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]] = False
    return keep


def _check_sides(sources: Sequence[Source], result: Scan, fraction: float) -> None:
    counts = np.zeros((len(sources), 2), np.int64)
    for start in range(0, len(result.records), _RECORDS_AT_ONCE):
        part = result.records[start : start + _RECORDS_AT_ONCE][result.keep[start : start + _RECORDS_AT_ONCE]]
        np.add.at(counts, (part["source"], part["validation"].astype(np.int64)), 1)
    for source, (training, held_out), dropped in zip(sources, counts, result.dropped, strict=True):
        if training + held_out == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
            raise UserError(
                f"config.data.sources: {source.name}: no document with text in {len(source.files)} file(s)"
                + (f" ({reasons})" if reasons else "")
            )
        if training == 0:
            raise UserError(
                f"config.data.sources: {source.name}: all of its {held_out} document(s) fell to validation; give it "
                f"more documents (files, or lines of JSONL), or lower config.data.validation_fraction ({fraction})"
            )
    if not counts[:, 1].any():
        raise UserError(
            f"config.data.validation_fraction = {fraction}: none of the {counts.sum()} document(s) fell to validation; "
            "raise it, or give more documents (a document is a file, or a line of JSONL, and is never cut in two)"
        )


class _RecordWriter:
    """Appends records to a file, many at a time."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._pending: list[tuple[int, int, int, bool, bool]] = []
        self.count = 0

    def write(self, record: tuple[int, int, int, bool, bool]) -> None:
        self._pending.append(record)
        self.count += 1
        if len(self._pending) == _RECORDS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        self._file.write(np.array(self._pending, _RECORD).tobytes())
        self._file.flush()
        self._pending.clear()


class _Sampler:
    """Whole documents with the lowest hashes, of about so many bytes: the same whatever the order they come in."""

    def __init__(self, size: int):
        self._size = size
        self._held = 0
        self._heap: list[tuple[int, int, str]] = []  # the highest hash first: (-hash, document, text)

    def offer(self, priority: int, document: int, text: str) -> None:
        if not self._size or (self._held >= self._size and -priority <= self._heap[0][0]):
            return
        text = text[:_SAMPLE_CHARACTERS_OF_ONE]
        heapq.heappush(self._heap, (-priority, document, text))
        self._held += len(text)
        while self._held - len(self._heap[0][2]) >= self._size:
            self._held -= len(heapq.heappop(self._heap)[2])

    def texts(self, keep: np.ndarray) -> list[str]:
        return [text for _, document, text in sorted(self._heap, reverse=True) if keep[document]]
