"""Rows to batches: in which order, for which process, from which position on; prepared ahead by a thread.

The position is one integer, the rows that all processes together have consumed, and every batch is a pure function of
it: a run resumes from that number alone, with another number of processes too, and needs no iterator's state.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.order import permute
from wmtp_jax.data.packing import Rows
from wmtp_jax.data.targets import positions, shift_targets
from wmtp_jax.errors import UserError

Batch = dict[str, np.ndarray]

_WEIGHT_STEPS = 1 << 20
_ROWS_AT_ONCE = 1 << 10


class RowOrder:
    """Which row of which source stands at a position of the endless training stream.

    Sources alternate as evenly as their weights allow, not at random: after n rows, source i has had n times its share,
    rounded down or up. Each pass over a source goes through its rows in another order, drawn from the seed.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float] | None, seed: int):
        """Fixes the order.

        Args:
          lengths: rows of each source.
          weights: their shares, in any unit (kept to a millionth); None: in proportion to their rows, so that each
            `sum(lengths)` positions hold every row once.
          seed: of the order of rows.
        """
        self._lengths = lengths
        self._seed = seed
        total = sum(weights) if weights else 1
        self._shares = [max(1, round(w / total * _WEIGHT_STEPS)) for w in weights] if weights else list(lengths)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int `[N]` positions -> int64 `[N]` sources and int64 `[N]` rows."""
        sources, rank = self.turns(positions)
        rows = np.empty_like(rank)
        for source in np.unique(sources):
            length = self._lengths[source]
            epochs = rank // length
            for epoch in np.unique(epochs[sources == source]):
                here = (sources == source) & (epochs == epoch)
                rows[here] = permute(rank[here] % length, length, ("rows", self._seed, int(source), int(epoch)))
        return sources, rows

    def turns(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int `[N]` positions -> int64 `[N]` sources, and how many earlier positions fell to the same one."""
        rank = np.array(positions, np.int64)
        sources = np.full(rank.shape, len(self._shares) - 1, np.int64)
        undecided = np.ones(rank.shape, bool)
        for source, share in enumerate(self._shares[:-1]):
            if not share:  # no rows of its own
                continue
            # Of the first n positions that are left, this source has floor(n share / rest): one more at its own.
            rest = sum(self._shares[source:])
            before, after = ((n // rest) * share + (n % rest) * share // rest for n in (rank, rank + 1))
            here = undecided & (after > before)
            sources[here] = source
            undecided &= ~here
            rank = np.where(here, before, np.where(undecided, rank - before, rank))
        return sources, rank


def rows_per_epoch(corpus: Corpus) -> int:
    """Training rows of all sources; with weights of one's own, some are seen more than once in so many, others less."""
    return sum(len(source.train) for source in corpus.sources)


def make_batch(columns: dict[str, np.ndarray], *, num_heads: int) -> Batch:
    """The batch of some rows.

    Args:
      columns: `tokens`, `segment_ids`, perhaps `loss_mask` and others, `[B, S]` each.
      num_heads: H.

    Returns:
      `tokens`, `segment_ids` and `positions` int32 `[B, S]`, `targets` int32 and `mask` bool `[B, S, H]`, and the other
      columns as they are.
    """
    tokens, segment_ids = columns["tokens"].astype(np.int32), columns["segment_ids"].astype(np.int32)
    loss_mask = columns["loss_mask"] if "loss_mask" in columns else None
    targets, mask = shift_targets(tokens, segment_ids, num_heads=num_heads, loss_mask=loss_mask)
    others = {name: values for name, values in columns.items() if name not in ("tokens", "segment_ids", "loss_mask")}
    shared = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions(segment_ids)}
    return shared | {"targets": targets, "mask": mask} | others


class Batches:
    """The endless stream of training batches, from a position on; an iterator that is closed when done with.

    Process p of P gets rows `position + p * B / P` up to `position + (p + 1) * B / P` of every global batch of B rows.

    Attributes:
      position: rows that all processes together have consumed, after the last batch given out; put it in checkpoints.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_size: int,
        num_heads: int,
        seed: int,
        start_position: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ):
        """Starts at a position; prefetching begins with the first batch.

        Args:
          corpus: what to read.
          batch_size: B, rows of the global batch.
          num_heads: H.
          seed: of the order of rows.
          start_position: where to go on.
          process_index, process_count: whose share of each batch.
          prefetch: batches that a thread prepares ahead; 0: none, in the caller's thread.

        Raises:
          UserError: a global batch that the processes can't share.
        """
        self.position = start_position
        self._batch_size, self._num_heads = batch_size, num_heads
        self._parts = [source.train for source in corpus.sources]
        self._order = RowOrder([len(part) for part in self._parts], corpus.weights, seed)
        self._share = _share(batch_size, process_index, process_count)
        self._starts = itertools.count(start_position, batch_size)
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._ahead: collections.deque[Future[Batch]] = collections.deque()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            batch = self._batch_at(next(self._starts))
        else:
            while len(self._ahead) <= self._prefetch:
                self._ahead.append(self._pool.submit(self._batch_at, next(self._starts)))
            batch = self._ahead.popleft().result()
        self.position += self._batch_size
        return batch

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the prefetching; no batch comes after."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _batch_at(self, position: int) -> Batch:
        """This process's share of the global batch that begins at a position."""
        sources, rows = self._order(position + self._share)
        return make_batch(_gather(self._parts, sources, rows), num_heads=self._num_heads)


def validation_batches(
    corpus: Corpus, *, batch_size: int, num_heads: int, num_batches: int | None = None, process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """The same validation rows each time, evenly spread over all sources' validation rows, in their order.

    Args:
      batch_size: B, rows of the global batch; each process yields its share, as in `Batches`.
      num_batches: how many batches at most; None: all rows. Fewer rows make fewer batches, the last one filled up with
        rows of padding (segment 0, mask False throughout), so that every batch has the same shape.

    Raises:
      UserError: a global batch that the processes can't share.
    """
    parts = [source.validation for source in corpus.sources]
    sources, rows = validation_rows(corpus, None if num_batches is None else num_batches * batch_size)
    count = len(rows)
    share = _share(batch_size, process_index, process_count)
    for start in range(0, count, batch_size):
        number = start + share
        real = number < count
        chosen = np.where(real, number, 0)
        columns = _gather(parts, sources[chosen], rows[chosen])
        columns = {name: np.where(real[:, None], c, np.zeros((), c.dtype)) for name, c in columns.items()}
        yield make_batch(columns, num_heads=num_heads)


def validation_rows(corpus: Corpus, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Sources and their row numbers, int `[n]` each, of at most `count` validation rows, evenly spread; None: of all."""
    sizes = np.array([len(source.validation) for source in corpus.sources])
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    count = total if count is None else min(total, count)
    spread = np.arange(count) * total // count
    sources = np.searchsorted(ends, spread, side="right")
    return sources, spread - (ends - sizes)[sources]


def distinct_training_rows(corpus: Corpus, *, seed: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
    """The columns `[n, S]` of the rows that a run consumes before a position, each row once, in blocks."""
    parts = [source.train for source in corpus.sources]
    lengths = np.array([len(part) for part in parts])
    order = RowOrder(lengths.tolist(), corpus.weights, seed)
    left = int(lengths.sum())
    for first in range(0, stop, _ROWS_AT_ONCE):
        where = np.arange(first, min(first + _ROWS_AT_ONCE, stop))
        sources, rank = order.turns(where)
        where = where[rank < lengths[sources]]
        yield _gather(parts, *order(where))
        left -= len(where)
        if not left:
            return


def _share(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    if batch_size % process_count:
        raise UserError(f"config.train.batch_size = {batch_size}: must be a multiple of the {process_count} processes")
    rows = batch_size // process_count
    return np.arange(process_index * rows, (process_index + 1) * rows)


def _gather(parts: Sequence[Rows], sources: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of rows from several sources, which all have the same columns."""
    if len(parts) == 1:
        return parts[0][rows]
    gathered = {name: np.empty((len(rows), column.shape[1]), column.dtype) for name, column in parts[0].columns.items()}
    for source in np.unique(sources):
        here = sources == source
        for name, values in parts[source][rows[here]].items():
            gathered[name][here] = values
    return gathered
