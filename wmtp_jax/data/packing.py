"""Documents' tokens to rows of one length on disk, and rows from there: written in pieces, read by memory mapping."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np

from wmtp_jax.data.order import permute

_TOKENS_AT_ONCE = 1 << 20
_DOCUMENTS_AT_ONCE = 1 << 12


class TokenStore:
    """Tokens of documents in the order they come, in unnamed files, until all are there and rows can be cut."""

    def __init__(self, scratch: Path, dtype: np.dtype):
        self.dtype = dtype
        self.documents = 0
        self.tokens = 0
        self._tokens: BinaryIO = TemporaryFile(dir=scratch)
        self._ends: BinaryIO = TemporaryFile(dir=scratch)

    def append(self, documents: list[np.ndarray]) -> None:
        """Adds documents, each int `[n]`, its end-of-text token included."""
        if not documents:
            return
        ends = self.tokens + np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        self._tokens.write(np.concatenate(documents).astype(self.dtype).tobytes())
        self._ends.write(ends.tobytes())
        self.tokens = int(ends[-1])
        self.documents += len(documents)

    def shuffled(self) -> Iterator[np.ndarray]:
        """Every document once, in an order that depends on nothing but how many there are."""
        self._tokens.flush()
        self._ends.flush()
        width = self.dtype.itemsize
        for start in range(0, self.documents, _DOCUMENTS_AT_ONCE):
            index = np.arange(start, min(start + _DOCUMENTS_AT_ONCE, self.documents))
            for document in permute(index, self.documents, ("documents",)).tolist():
                first = self._end(document - 1) if document else 0
                size = self._end(document) - first
                yield np.frombuffer(os.pread(self._tokens.fileno(), size * width, first * width), self.dtype)

    def close(self) -> None:
        """Gives the disk space back."""
        self._tokens.close()
        self._ends.close()

    def _end(self, document: int) -> int:
        return int.from_bytes(os.pread(self._ends.fileno(), 8, 8 * document), "little")


def pack(documents: Iterator[np.ndarray], *, sequence_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents one after the other, cut into rows; each piece of a document in a row is a segment of its own.

    Args:
      documents: int `[n]` each.
      sequence_length: S.

    Yields:
      tokens and segment_ids `[rows, S]`, about a million tokens at a time; segments of a row are numbered 1, 2, 3...
      Only the last row of all is padded, with token 0 and segment 0.
    """
    pieces: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    held = 0
    for document in documents:
        first = np.zeros(len(document), bool)
        first[:1] = True
        pieces.append(document)
        starts.append(first)
        held += len(document)
        if held >= _TOKENS_AT_ONCE + sequence_length:
            tokens, first = np.concatenate(pieces), np.concatenate(starts)
            whole = held // sequence_length * sequence_length
            yield _rows(tokens[:whole], first[:whole], sequence_length)
            pieces, starts, held = [tokens[whole:]], [first[whole:]], held - whole
    if held:
        tokens, first = np.concatenate(pieces), np.concatenate(starts)
        padding = -held % sequence_length
        rows, segment_ids = _rows(np.pad(tokens, (0, padding)), np.pad(first, (0, padding)), sequence_length)
        segment_ids[-1, sequence_length - padding :] = 0
        yield rows, segment_ids


def _rows(tokens: np.ndarray, first: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    first = first.reshape(-1, sequence_length).copy()
    first[:, 0] = True
    return tokens.reshape(-1, sequence_length), np.cumsum(first, axis=1, dtype=np.int32)


def write_columns(
    path_of: Callable[[str], Path], blocks: Iterator[tuple[np.ndarray, np.ndarray]], *, rows: int, sequence_length: int,
    token_dtype: np.dtype,
) -> None:  # fmt: skip
    """Writes blocks of rows as the `.npy` files `path_of("tokens")` and `path_of("segment_ids")`."""
    dtypes = {"tokens": token_dtype, "segment_ids": np.dtype(np.uint16 if sequence_length < 1 << 16 else np.int32)}
    with open(path_of("tokens"), "wb") as tokens_file, open(path_of("segment_ids"), "wb") as segments_file:
        files = {"tokens": tokens_file, "segment_ids": segments_file}
        for name, file in files.items():
            header = {"descr": np.lib.format.dtype_to_descr(dtypes[name]), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, header | {"shape": (rows, sequence_length)})
        for block in blocks:
            for (name, file), values in zip(files.items(), block, strict=True):
                file.write(np.ascontiguousarray(values, dtypes[name]).tobytes())


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


def open_rows(path_of: Callable[[str], Path], names: tuple[str, ...] = ("tokens", "segment_ids")) -> Rows:
    """Maps the columns that `write_columns` wrote.

    Raises:
      ValueError: a file that is shorter than its header says.
    """
    return Rows({name: np.load(path_of(name), mmap_mode="r").view(np.ndarray) for name in names})
