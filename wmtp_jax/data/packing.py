"""Documents' tokens to rows of one length on disk, and rows from there: written in pieces, read by memory mapping."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, NamedTuple

import numpy as np

from wmtp_jax.data.order import permute

_TOKENS_AT_ONCE = 1 << 20
_DOCUMENTS_AT_ONCE = 1 << 12


class Packable(NamedTuple):
    """A document in tokens.

    Attributes:
      tokens: int `[n]`, its end-of-text token included.
      allowed: bool `[n]`, which of them may be targets.
      label: NaN where it has none.
      joined: it stays behind the document before it.
      whole: it is not cut where a row ends.
    """

    tokens: np.ndarray
    allowed: np.ndarray
    label: float
    joined: bool
    whole: bool = False


class TokenStore:
    """Documents in the order they come, in unnamed files, until all are there and rows can be cut."""

    _ENTRY = np.dtype([("end", "<i8"), ("label", "<f4"), ("whole", "?")])

    def __init__(self, scratch: Path, dtype: np.dtype):
        self.dtype = dtype
        self.documents = 0
        self.tokens = 0
        self._groups = 0
        self._tokens: BinaryIO = TemporaryFile(dir=scratch)
        self._allowed: BinaryIO = TemporaryFile(dir=scratch)
        self._entries: BinaryIO = TemporaryFile(dir=scratch)
        self._firsts: BinaryIO = TemporaryFile(dir=scratch)  # of each group of joined documents, which is the first

    def append(self, documents: list[Packable]) -> None:
        """Adds documents."""
        if not documents:
            return
        entries = np.zeros(len(documents), self._ENTRY)
        entries["end"] = self.tokens + np.cumsum([len(document.tokens) for document in documents], dtype=np.int64)
        entries["label"] = [document.label for document in documents]
        entries["whole"] = [document.whole for document in documents]
        self._tokens.write(np.concatenate([document.tokens for document in documents]).astype(self.dtype).tobytes())
        self._allowed.write(np.concatenate([document.allowed for document in documents]).tobytes())
        self._entries.write(entries.tobytes())
        first = np.array([not document.joined for document in documents])
        first[0] |= self.documents == 0
        self._firsts.write((self.documents + np.flatnonzero(first)).astype("<i8").tobytes())
        self._groups += int(first.sum())
        self.tokens = int(entries["end"][-1])
        self.documents += len(documents)

    def shuffled(self) -> Iterator[Packable]:
        """Every document once, groups together, in an order that depends on nothing but how many groups there are."""
        for file in (self._tokens, self._allowed, self._entries, self._firsts):
            file.flush()
        for start in range(0, self._groups, _DOCUMENTS_AT_ONCE):
            index = np.arange(start, min(start + _DOCUMENTS_AT_ONCE, self._groups))
            for group in permute(index, self._groups, ("documents",)).tolist():
                first = self._first(group)
                for number in range(first, self._first(group + 1)):
                    yield self._read(number, joined=number > first)

    def close(self) -> None:
        """Gives the disk space back."""
        for file in (self._tokens, self._allowed, self._entries, self._firsts):
            file.close()

    def _read(self, number: int, *, joined: bool) -> Packable:
        first = int(self._entry(number - 1)["end"]) if number else 0
        entry = self._entry(number)
        size, width = int(entry["end"]) - first, self.dtype.itemsize
        tokens = np.frombuffer(os.pread(self._tokens.fileno(), size * width, first * width), self.dtype)
        allowed = np.frombuffer(os.pread(self._allowed.fileno(), size, first), bool)
        return Packable(tokens, allowed, float(entry["label"]), joined, bool(entry["whole"]))

    def _entry(self, number: int) -> np.void:
        width = self._ENTRY.itemsize
        return np.frombuffer(os.pread(self._entries.fileno(), width, width * number), self._ENTRY)[0]

    def _first(self, group: int) -> int:
        if group == self._groups:
            return self.documents
        return int.from_bytes(os.pread(self._firsts.fileno(), 8, 8 * group), "little")


# What columns hold where there is no document.
_PADDING = {"tokens": 0, "segment_ids": 0, "loss_mask": False, "labels": np.nan}


def cut(tokens: np.ndarray, *, room: int, length: int, begin: int | None) -> Iterator[tuple[slice, bool]]:
    """Where rows cut a document, and whether a piece lacks the token that begins a text and is to get it.

    Args:
      tokens: of the document, `[n]`.
      room: of the first piece.
      length: of the others, at least 2.
      begin: the token that begins a text; None: there is none.
    """
    start = 0
    while start < len(tokens):
        lacks = begin is not None and bool(tokens[start] != begin)
        stop = min(start + room - lacks, len(tokens))
        yield slice(start, stop), lacks
        start, room = stop, length


def pack(
    documents: Iterable[Packable], *, sequence_length: int, begin: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Documents one after the other, in rows; each piece of a document in a row is a segment of its own.

    Documents are cut wherever a row ends. One that stays whole and doesn't fit into what is left of a row begins the next
    one.

    Args:
      documents: in their order; those that stay whole are no longer than a row.
      sequence_length: S.
      begin: the token that every segment begins with; None: there is none.

    Yields:
      `tokens`, `segment_ids`, `loss_mask` and `labels` `[rows, S]`, about a million tokens at a time; segments of a row are
      numbered 1, 2, 3... What is not filled has token 0, segment 0, loss_mask False and label NaN: the end of the last row
      of all, and that of rows before a document that stays whole.
    """
    pieces: list[dict[str, np.ndarray]] = []
    held = 0
    for document in documents:
        size = len(document.tokens)
        room = -held % sequence_length
        if document.whole and size > (room or sequence_length):
            pieces.append(_filler(room))
            held += room
        room = -held % sequence_length or sequence_length
        for part, lacks in cut(document.tokens, room=room, length=sequence_length, begin=begin):
            piece = _piece(document, part, begin if lacks else None)
            pieces.append(piece)
            held += len(piece["tokens"])
        if held >= _TOKENS_AT_ONCE + sequence_length:
            columns = _joined(pieces)
            complete = held // sequence_length * sequence_length
            yield _rows({name: column[:complete] for name, column in columns.items()}, sequence_length)
            pieces, held = [{name: column[complete:] for name, column in columns.items()}], held - complete
    if held:
        pieces.append(_filler(-held % sequence_length))
        yield _rows(_joined(pieces), sequence_length)


def _piece(document: Packable, part: slice, begin: int | None) -> dict[str, np.ndarray]:
    """A piece of a document, a segment of its own, after the token that begins a text where one is given."""
    before = [] if begin is None else [begin]
    tokens = np.concatenate([np.array(before, document.tokens.dtype), document.tokens[part]])
    return {
        "tokens": tokens,
        "segment_ids": np.arange(len(tokens)) == 0,
        "loss_mask": np.pad(document.allowed[part], (len(before), 0)),
        "labels": np.full(len(tokens), document.label, np.float32),
    }


def _filler(size: int) -> dict[str, np.ndarray]:
    """Padding; the segment -1 sets it off from a document that goes on."""
    return {name: np.full(size, -1 if name == "segment_ids" else value) for name, value in _PADDING.items()}


def _joined(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in _PADDING}


def _rows(columns: dict[str, np.ndarray], sequence_length: int) -> dict[str, np.ndarray]:
    """Rows of a stretch of columns; `segment_ids` come as 1 where a document begins, 0 where it goes on, -1 in padding."""
    rows = {name: column.reshape(-1, sequence_length) for name, column in columns.items()}
    first = rows["segment_ids"] == 1
    first[:, 0] = True
    rows["segment_ids"] = np.where(rows["segment_ids"] < 0, 0, np.cumsum(first, axis=1, dtype=np.int32))
    return rows


def column_dtypes(*, sequence_length: int, vocabulary_size: int) -> dict[str, np.dtype]:
    """How each column lies on disk."""
    return {
        "tokens": np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.int32),
        "segment_ids": np.dtype(np.uint16 if sequence_length < 1 << 16 else np.int32),
        "loss_mask": np.dtype(bool),
        "labels": np.dtype(np.float32),
    }


def write_columns(
    path_of: Callable[[str], Path], blocks: Iterable[dict[str, np.ndarray]], *, dtypes: dict[str, np.dtype],
    sequence_length: int,
) -> int:  # fmt: skip
    """Writes the columns that `dtypes` names as `.npy` files `path_of(name)`; returns how many rows they have."""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(path_of(name), "wb")) for name in dtypes}

        def write_headers(rows: int) -> None:
            # numpy leaves room for any number of rows, so that a header keeps its size.
            for name, file in files.items():
                header = {"descr": np.lib.format.dtype_to_descr(dtypes[name]), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, header | {"shape": (rows, sequence_length)})

        rows = 0
        write_headers(rows)
        for block in blocks:
            for name, file in files.items():
                file.write(np.ascontiguousarray(block[name], dtypes[name]).tobytes())
            rows += len(block["tokens"])
        for file in files.values():
            file.seek(0)
        write_headers(rows)
    return rows


@dataclass(frozen=True)
class Rows:
    """Packed rows: columns of equal shape `[N, S]`, such as memory-mapped files.

    `tokens` and `segment_ids` are always there; `loss_mask` says which tokens may be targets; any other column (stored
    losses of a reference, say) goes into batches as it is.
    """

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["tokens"])

    def __getitem__(self, index: int | slice | np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(column[index]) for name, column in self.columns.items()}


def open_column(path: Path) -> np.ndarray:
    """Maps one column that `write_columns` wrote.

    Raises:
      ValueError: a file that is shorter than its header says.
    """
    return np.load(path, mmap_mode="r").view(np.ndarray)
