"""The first pass over the sources: every document checked, counted, hashed, and given to training or validation."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np

from wmtp_jax.data.documents import Document, digest_of, text_key
from wmtp_jax.data.sources import Source
from wmtp_jax.errors import UserError
from wmtp_jax.storage.long_work import LongWork

SPLITS = ("train", "validation")
DROPPED = ("duplicate", "contradictory", "empty", "undecodable")

# What becomes of a document.
_KEPT, _DUPLICATE, _COPY_OF_ANOTHER_SOURCE, _CONTRADICTORY = range(4)
_NO_LABEL, _RIGHT_OR_WRONG, _SCORE = range(3)  # kinds of labels

# What the content hash of a corpus holds of each document: its digest, its source, and the place of its side in SPLITS.
_HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("source", "<u4"), ("side", "u1")])
_RECORD = np.dtype([
    *_HASHED.descr,
    ("text_high", "<u8"), ("text_low", "<u8"),  # `text_key`
    ("joined", "?"),  # of the same problem as the document before it
    ("whole", "?"), ("chat", "?"),  # in parts; written by a chat template
    ("label_kind", "u1"), ("label", "<f8"),
    ("relabelled", "?"),  # the label is not the document's own, but that of all copies of its text
])  # fmt: skip
_RECORDS_AT_ONCE = 1 << 16
# Copies are looked for among so many records at a time, split by hash: 120 MB.
_RECORDS_SORTED_AT_ONCE = 1 << 20
_SAMPLE_CHARACTERS_OF_ONE = 1 << 20


@dataclass
class Scan:
    """What the first pass learned.

    Attributes:
      records: one entry a document, in the order of the sources, on disk.
      keep: bool `[documents]`, True for the one copy of a text that stays, over all sources.
      file_hashes: for each source, the content hash of each of its files.
      dropped: for each source, how many documents were left out, by reason.
      content_hash: of the documents that are kept, their labels, the side that each is on, and which of them stay together.
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
    """What the documents of a source have.

    Attributes:
      plain, parts, chat: some that is kept is all text, is in parts, was written by a chat template.
      labelled, failed: some that is kept has a label, has the label False.
      copies: some is left out because another source has its text.
      scores: labels that are numbers, as the source has them; of more than two, some.
      identities: of the documents; of more than one, some.
    """

    plain: bool = False
    parts: bool = False
    chat: bool = False
    labelled: bool = False
    failed: bool = False
    copies: bool = False
    scores: set[float] = field(default_factory=set)
    identities: set[str] = field(default_factory=set)

    def note(self, document: Document) -> None:
        """Adds a document that is read."""
        if isinstance(document.label, float) and len(self.scores) < 3:
            self.scores.add(document.label)
        if len(self.identities) < 2:
            self.identities.add(document.identity)

    def note_kept(self, records: np.ndarray) -> None:
        """Adds documents that are kept."""
        wrong = (records["label_kind"] == _RIGHT_OR_WRONG) & (records["label"] == 0)
        self.plain |= bool((~records["whole"]).any())
        self.parts |= bool(records["whole"].any())
        self.chat |= bool(records["chat"].any())
        self.labelled |= bool((records["label_kind"] != _NO_LABEL).any())
        self.failed |= bool(wrong.any())

    @property
    def scores_are_verdicts(self) -> bool:
        """Whether the numbers look like right and wrong: 0 and 1, or 0 alone."""
        return 0.0 in self.scores and self.scores <= {0.0, 1.0}

    @property
    def one_identity(self) -> bool:
        """Whether all documents have the same prompt or problem."""
        return len(self.identities) == 1 and "" not in self.identities


def is_validation(identity: bytes, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its identity alone, so that a file or a problem never changes sides."""
    digest = hashlib.blake2b(identity, digest_size=8, person=b"wmtp split").digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def side_of(document: Document, *, validation_fraction: float) -> str:
    """Which of `SPLITS` a document is on: as its source says, else by its problem, prompt or path, else by its text."""
    if document.side:
        return document.side
    identity = os.fsencode(document.identity) or hashlib.blake2b(document.text.encode(), digest_size=16).digest()
    return "validation" if is_validation(identity, validation_fraction) else "train"


def read_documents(
    source: Source, dropped: dict[str, int], on_file: Callable[[str], None], *, doing: str = "reading"
) -> Iterator[Document]:
    """The documents of a source that hold text.

    Args:
      dropped: counts of those left out, added to.
      on_file: called with the content hash of each file after its last document.
      doing: what the caller does with them, for the lines that say how far it has come.
    """
    total = sum(file.size for file in source.files)
    with LongWork(f"{doing} {source.name}", total=total / 1e6, unit="MB") as work:
        for file in source.files:
            digest = _CountedHash(work)
            for document in source.read(file, digest):
                if document is None:
                    dropped["undecodable"] += 1
                elif not document.text.strip():
                    dropped["empty"] += 1
                else:
                    yield document
            on_file(digest.hexdigest())


class _CountedHash:
    """A hash of content that counts the bytes it is fed as work done."""

    def __init__(self, work: LongWork):
        self._digest = hashlib.blake2b(digest_size=16)
        self._work = work

    def update(self, data: bytes) -> None:
        self._digest.update(data)
        self._work.done += len(data) / 1e6

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def scan(sources: Sequence[Source], *, validation_fraction: float, sample_bytes: int, scratch: Path) -> Scan:
    """Reads every document once; writes nothing but an unnamed file in `scratch`.

    Memory does not grow with the corpus but for one byte a document and the list of files.

    Raises:
      UserError: content that is no document, a source without one, or without one for training; none for validation. A
        source may be all copies of others' texts.
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
                side = side_of(document, validation_fraction=validation_fraction)
                before, problem = problem, (document.identity, document.side)
                joined = document.identity != "" and before == problem
                record = _record(document, source=number, side=side, joined=joined)
                if side == "train":
                    sampler.offer(record[0], writer.count, document.text)
                writer.write(record)
                traits[number].note(document)
        writer.flush()
        # The mapping keeps the unnamed file alive.
        records = np.memmap(file, _RECORD, "r+", shape=(writer.count,)) if writer.count else np.zeros(0, _RECORD)
    with LongWork(f"looking for copies among {len(records):,} texts"):
        verdicts = choose_copies(records)
    keep = verdicts == _KEPT
    content, joined_hash = hashlib.sha256(), hashlib.sha256()
    labels = hashlib.sha256()
    for start in range(0, len(records), _RECORDS_AT_ONCE):
        part = slice(start, start + _RECORDS_AT_ONCE)
        block, kept, verdict = records[part], records[part][keep[part]], verdicts[part]
        content.update(kept[list(_HASHED.names)].astype(_HASHED).tobytes())
        joined_hash.update(block["joined"].tobytes() + keep[part].tobytes())
        labels.update(kept[kept["relabelled"]][["text_high", "text_low", "label_kind", "label"]].tobytes())
        for number in np.unique(block["source"]):
            of_source = block["source"] == number
            count = np.bincount(verdict[of_source], minlength=_CONTRADICTORY + 1).tolist()
            dropped[number]["duplicate"] += count[_DUPLICATE] + count[_COPY_OF_ANOTHER_SOURCE]
            dropped[number]["contradictory"] += count[_CONTRADICTORY]
            traits[number].copies |= count[_COPY_OF_ANOTHER_SOURCE] > 0
            traits[number].note_kept(kept[kept["source"] == number])
    # Only where there is something to add, so that all other corpora keep the hash that they had before.
    if records["joined"].any():
        content.update(joined_hash.digest())
    if records["relabelled"].any():
        content.update(labels.digest())
    if not all(some.plain or some.parts for some in traits):  # a source without a document of its own
        content.update(str(len(sources)).encode())
    result = Scan(records, keep, file_hashes, dropped, content.hexdigest(), sampler.texts(keep), traits)
    _check_sides(sources, result, validation_fraction)
    return result


def kept_documents(
    source: Source, number: int, found: Scan, *, doing: str = "reading"
) -> Iterator[tuple[str, bool, Document]]:
    """The documents of a source that a scan kept, each with its side and whether it stays behind the one before it.

    Args:
      number: of the source, in the scan.
      doing: as `read_documents` takes it.

    Raises:
      UserError: a file is not what it was when it was scanned.
    """
    record = int(np.searchsorted(found.records["source"], number))
    end = int(np.searchsorted(found.records["source"], number, side="right"))
    joined = True
    for document in read_documents(source, dict.fromkeys(DROPPED, 0), lambda content: None, doing=doing):
        known = found.records[record] if record < end else None
        if known is None or digest_of(document) != known.tobytes()[:16]:
            raise UserError(f"{source.name}: a file changed while it was being read; start again")
        joined &= bool(known["joined"])
        if found.keep[record]:
            yield SPLITS[known["side"]], joined, document._replace(label=_label_of(known))
            joined = True
        record += 1
    if record != end:
        raise UserError(f"{source.name}: a file changed while it was being read; start again")


def _record(document: Document, *, source: int, side: str, joined: bool) -> tuple:
    """A document as `_RECORD` has it."""
    digest, text = digest_of(document), text_key(document.text)
    kind = _NO_LABEL
    if document.label is not None:
        kind = _RIGHT_OR_WRONG if isinstance(document.label, bool) else _SCORE
    return (
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:], "little"),
        source,
        SPLITS.index(side),
        int.from_bytes(text[:8], "little"),
        int.from_bytes(text[8:], "little"),
        joined,
        bool(document.parts),
        any(part.template for part in document.parts),
        kind,
        float(document.label or 0),
        False,
    )


def _label_of(record: np.void) -> bool | float | None:
    if record["label_kind"] == _NO_LABEL:
        return None
    return bool(record["label"]) if record["label_kind"] == _RIGHT_OR_WRONG else float(record["label"])


def choose_copies(records: np.ndarray) -> np.ndarray:
    """Which copy of each text stays, uint8 `[documents]` of verdicts; that one gets the label of all of them, in place.

    A text that is held out anywhere is held out: that copy stays, of several the first. A label False beside any other
    label contradicts it, and all copies are left out. Scores, and True as 1, become their mean.
    """
    verdicts = np.full(len(records), _KEPT, np.uint8)
    parts = -(-len(records) // _RECORDS_SORTED_AT_ONCE) or 1
    for part in range(parts):
        chosen = []
        for start in range(0, len(records), _RECORDS_AT_ONCE):
            block = records["text_high"][start : start + _RECORDS_AT_ONCE]
            chosen.append(start + np.flatnonzero(block % parts == part))
        index = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
        if not len(index):
            continue
        high, low, side = records["text_high"][index], records["text_low"][index], records["side"][index]
        order = np.lexsort((index, -side.astype(np.int8), low, high))
        high, low, index = high[order], low[order], index[order]
        first = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))
        starts = np.flatnonzero(first)
        kind, label, contradictory = _common_labels(records["label_kind"][index], records["label"][index], starts)
        stays = index[starts]
        sizes = np.diff(np.append(starts, len(index)))
        same_source = records["source"][index] == np.repeat(records["source"][stays], sizes)
        verdicts[index] = np.where(same_source, _DUPLICATE, _COPY_OF_ANOTHER_SOURCE)
        verdicts[stays] = _KEPT
        verdicts[index[np.repeat(contradictory, sizes)]] = _CONTRADICTORY
        changed = (records["label_kind"][stays] != kind) | (records["label"][stays] != label)
        records["label_kind"][stays[changed]] = kind[changed]
        records["label"][stays[changed]] = label[changed]
        records["relabelled"][stays[changed]] = True
    return verdicts


def _common_labels(kinds: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, ...]:
    """The kind and the value of the label of each group of copies, and whether its labels contradict each other.

    Args:
      kinds, labels: `[copies]`, group after group.
      starts: where each group begins.
    """
    known = kinds != _NO_LABEL
    wrong = (kinds == _RIGHT_OR_WRONG) & (labels == 0)
    contradictory = np.logical_or.reduceat(wrong, starts) & np.logical_or.reduceat(known & ~wrong, starts)
    lowest = np.minimum.reduceat(np.where(known, labels, np.inf), starts)
    highest = np.maximum.reduceat(np.where(known, labels, -np.inf), starts)
    count = np.add.reduceat(known, starts, dtype=np.int64)
    mean = np.add.reduceat(np.where(known, labels, 0.0), starts) / np.maximum(count, 1)
    # Where all are alike, the mean of the sum would differ in the last digit.
    label = np.where(count == 0, 0.0, np.where(lowest == highest, lowest, mean))
    return np.maximum.reduceat(kinds, starts), label, contradictory


def _check_sides(sources: Sequence[Source], result: Scan, fraction: float) -> None:
    counts = np.zeros((len(sources), len(SPLITS)), np.int64)
    for start in range(0, len(result.records), _RECORDS_AT_ONCE):
        part = result.records[start : start + _RECORDS_AT_ONCE][result.keep[start : start + _RECORDS_AT_ONCE]]
        np.add.at(counts, (part["source"], part["side"]), 1)
    for source, (training, held_out), dropped, traits in zip(sources, counts, result.dropped, result.traits, strict=True):
        if training or traits.copies:
            continue
        if not held_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
            raise UserError(
                f"config.data.sources: {source.name}: no document with text in {len(source.files)} file(s)"
                + (f" ({reasons})" if reasons else "")
            )
        if held_out > 1 and traits.one_identity:
            raise UserError(_one_identity(source, held_out))
        raise UserError(_all_held_out(source.name, held_out, fraction))
    if not counts[:, 0].any():
        raise UserError(_all_held_out(", ".join(source.name for source in sources), int(counts.sum()), fraction))
    if not counts[:, 1].any():
        for source, (training, _), traits in zip(sources, counts, result.traits, strict=True):
            if training > 1 and traits.one_identity:
                raise UserError(_one_identity(source, training))
        raise UserError(
            f"config.data.validation_fraction = {fraction}: none of the {counts.sum()} document(s) fell to validation; "
            "raise it, or give more documents (a document is a file, or a line of JSONL, and is never cut in two)"
        )


def _all_held_out(name: str, count: int, fraction: float) -> str:
    return (
        f"config.data.sources: {name}: all of its {count} document(s) fell to validation; give it more documents (files, or "
        f"lines of JSONL), or lower config.data.validation_fraction ({fraction})"
    )


def _one_identity(source: Source, count: int) -> str:
    return (
        f"config.data.sources: {source.name}: all of its {count} documents have the same prompt or `problem`, and what has "
        "stays on one side, so that nothing can be held out; give the lines a field `problem` of different values, such as "
        "a number for each"
    )


class _RecordWriter:
    """Appends records to a file, many at a time."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._pending: list[tuple] = []
        self.count = 0

    def write(self, record: tuple) -> None:
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
