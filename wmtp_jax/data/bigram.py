"""What counting pairs of tokens achieves: the yardstick that every head of a trained model has to beat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.pipeline import Batch, distinct_training_rows
from wmtp_jax.data.targets import shift_targets
from wmtp_jax.storage.long_work import LongWork

_PAIRS_AT_ONCE = 1 << 22


class BigramScore(NamedTuple):
    """How well a bigram model does on validation, on the very targets that the model's head is scored on."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int  # validation targets scored


def bigram_metrics(corpus: Corpus, *, rows: int, seed: int, batches: Iterable[Batch]) -> dict[str, float | None]:
    """The evaluation metrics of bigram models that counted what a run has trained on.

    Head k is matched by a model of P(x[s+1+k] | x[s]), counted on pairs at that distance.

    Args:
      rows: that the run has consumed, from position 0 on. A row seen twice counts once: copies would hide which pairs
        are rare, and so spoil the smoothing.
      seed: of the run's order of rows.
      batches: the validation batches of the run; gone through once a head.

    Returns:
      `eval/ce_head_{k}` in nats a token, and `eval/bits_per_byte` of head 0; None where the rows that were consumed have no
      pair at the head's distance.
    """
    vocabulary_size, token_bytes = corpus.tokenizer.vocabulary_size, corpus.tokenizer.token_bytes
    batches = list(batches)
    scores: list[BigramScore | None] = []
    heads = batches[0]["mask"].shape[-1]
    with LongWork("counting pairs of tokens for the bigram model", total=heads, unit="heads") as work:
        for head in range(heads):
            counted = distinct_training_rows(corpus, seed=seed, stop=rows)
            model = Bigram(counted, vocabulary_size=vocabulary_size, head=head)
            scores.append(model.score(batches, token_bytes=token_bytes) if model.pairs else None)
            work.done += 1
    metrics = {f"eval/ce_head_{head}": score.nats_per_token if score else None for head, score in enumerate(scores)}
    return metrics | {"eval/bits_per_byte": scores[0].bits_per_byte if scores[0] else None}


class Bigram:
    """The interpolated Kneser-Ney bigram model (Kneser and Ney, 1995; Chen and Goodman, 1998, section 2.7), for one head.

    P(y | x) = (max(c(xy) - d, 0) + d n(x.) P(y)) / c(x), where n(x.) counts the distinct followers of x, and
    P(y) = (max(n(.y) - d, 0) + d u / V) / n(..), where n(.y) counts the distinct predecessors of y and u the y that have
    one. d = (n1 + 1) / (n1 + 2 n2 + 2) from the pairs seen once and twice. On source code it is a little better than
    Witten-Bell, Dirichlet and absolute discounting over plain frequencies. Memory grows with distinct pairs, not V².

    Attributes:
      pairs: how many distinct ones were counted; without any, there is no probability.
    """

    def __init__(self, rows: Iterable[Mapping[str, np.ndarray]], *, vocabulary_size: int, head: int = 0):
        """Counts pairs of a token and its target, within segments.

        Args:
          rows: blocks of columns, `[n, S]` each: tokens, segment_ids, and perhaps the loss_mask of tokens that may be targets.
          vocabulary_size: V.
          head: k; the target of x[s] is x[s + 1 + k].
        """
        self._vocabulary_size, self._head = vocabulary_size, head
        self._pairs, self._counts = _count_pairs(rows, vocabulary_size, head)
        self.pairs = len(self._pairs)
        first, second = np.divmod(self._pairs, vocabulary_size)
        once, twice = np.sum(self._counts == 1), np.sum(self._counts == 2)
        self._discount = (once + 1) / (once + 2 * twice + 2)
        self._context_counts = np.bincount(first, self._counts, vocabulary_size)
        self._followers = np.bincount(first, minlength=vocabulary_size)
        predecessors = np.bincount(second, minlength=vocabulary_size)
        spread = self._discount * np.sum(predecessors > 0) / vocabulary_size
        self._unigram = (np.maximum(predecessors - self._discount, 0) + spread) / max(self.pairs, 1)

    def probability(self, context: np.ndarray, target: np.ndarray) -> np.ndarray:
        """P(target | context), float64, for arrays of token ids of one shape."""
        pair = context.astype(np.int64) * self._vocabulary_size + target
        place = np.minimum(np.searchsorted(self._pairs, pair), len(self._pairs) - 1)
        count = np.where(self._pairs[place] == pair, self._counts[place], 0)
        total = self._context_counts[context]
        backed_off = self._discount * self._followers[context] * self._unigram[target]
        seen = (np.maximum(count - self._discount, 0) + backed_off) / np.maximum(total, 1)
        return np.where(total > 0, seen, self._unigram[target])

    def score(self, batches: Iterable[Batch], *, token_bytes: np.ndarray) -> BigramScore:
        """Scores the targets of the head.

        Args:
          batches: with `tokens` `[B, S]`, `targets` and `mask` `[B, S, H]`, H above the head.
          token_bytes: int `[V]`, UTF-8 bytes that each token stands for.
        """
        nats, tokens, size = 0.0, 0, 0
        for batch in batches:
            mask = batch["mask"][..., self._head]
            target = batch["targets"][..., self._head][mask]
            nats -= float(np.log(self.probability(batch["tokens"][mask], target)).sum())
            tokens += len(target)
            size += int(token_bytes[target].sum())
        return BigramScore(nats / tokens, nats / math.log(2) / size, tokens)


def _count_pairs(
    rows: Iterable[Mapping[str, np.ndarray]], vocabulary_size: int, head: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs `x V + y`, sorted, and how often each occurs, int64 both."""
    pairs, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    for columns in rows:
        tokens, loss_mask = columns["tokens"], columns["loss_mask"] if "loss_mask" in columns else None
        targets, mask = shift_targets(tokens, columns["segment_ids"], num_heads=head + 1, loss_mask=loss_mask)
        target, counted = targets[..., head], mask[..., head]
        waiting.append(tokens[counted].astype(np.int64) * vocabulary_size + target[counted])
        if sum(map(len, waiting)) >= _PAIRS_AT_ONCE:
            pairs, counts = _merge(pairs, counts, np.concatenate(waiting))
            waiting.clear()
    return _merge(pairs, counts, np.concatenate([np.zeros(0, np.int64), *waiting]))


def _merge(pairs: np.ndarray, counts: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    new, new_counts = np.unique(more, return_counts=True)
    merged, place = np.unique(np.concatenate([pairs, new]), return_inverse=True)
    total = np.zeros(len(merged), np.int64)
    np.add.at(total, place, np.concatenate([counts, new_counts]))
    return merged, total
