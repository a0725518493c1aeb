"""From sums over batches to the evaluation's metrics, on the host and in float64; shared by both backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from wmtp_jax.errors import UserError

Batch = dict[str, Any]


def evaluate(sums: Callable[[Batch], tuple[Any, Any, Any]], batches: Iterable[Batch]) -> dict[str, float]:
    """The evaluation metrics over all batches: every target counts once, whatever batch it is in.

    Args:
      sums: a batch to nats `[H]`, targets `[H]` and bytes of head 0's targets (scalar), each summed over the batch.
      batches: at least one with a target for every head.

    Returns:
      `eval/ce_head_{k}` in nats a token, `eval/ce_mean` over the heads, `eval/bits_per_byte` of head 0 (all bytes of its
      targets; a row's or segment's first token is no target and its bytes don't count).

    Raises:
      UserError: a head has no target at all.
    """
    # Summed in float64 on the host: a sum of 1e7 float32 losses would lose its last digits.
    nats, counts, head_0_bytes = _totals(sums, batches)
    _check_counts(counts, head_0_bytes)
    cross_entropy = nats / counts
    metrics = {f"eval/ce_head_{k}": float(value) for k, value in enumerate(cross_entropy)}
    metrics["eval/ce_mean"] = float(cross_entropy.mean())
    metrics["eval/bits_per_byte"] = float(nats[0] / head_0_bytes / math.log(2))
    return metrics


def check_held_out(batches: Iterable[Batch], token_bytes: np.ndarray) -> None:
    """Refuses what `evaluate` would refuse, before anything is trained.

    Args:
      batches: at least one, of whole rows.
      token_bytes: `[V]`, UTF-8 bytes that each token stands for.

    Raises:
      UserError: a head has no target at all.
    """
    counts, size = 0, 0
    for batch in batches:
        counts += batch["mask"].sum(axis=(0, 1))
        size += int(token_bytes[batch["targets"][..., 0][batch["mask"][..., 0]]].sum())
    _check_counts(np.asarray(counts), size)


def _check_counts(counts: np.ndarray, head_0_bytes: float) -> None:
    if not counts.all() or not head_0_bytes:
        raise UserError(
            f"the held-out rows have no target for head {int(np.argmin(counts))}: their texts are too short; hold out more with "
            "config.data.validation_fraction, or use fewer heads"
        )


def value_metrics(sums: Callable[[Batch], tuple[Any, ...]], batches: Iterable[Batch]) -> dict[str, float]:
    """How good the values are on held-out segments.

    Args:
      sums: a batch to the five numbers of `critic.ValueSums`.
      batches: at least one with a rewarded segment, and rewards that differ.

    Returns:
      `eval/value_loss`, the mean of (G - V)² over tokens with G the discounted reward, and `eval/explained_variance`,
      1 - Var(G - V) / Var(G): 0 for a constant, 1 for a perfect value.

    Raises:
      UserError: no rewarded segment, or all rewards alike.
    """
    count, target, target_squared, missed, missed_squared = _totals(sums, batches)
    if not count:
        raise UserError("the held-out rows have no segment with a reward; hold out more with config.data.validation_fraction")
    variance = target_squared / count - (target / count) ** 2
    if variance <= 1e-12 * max(1.0, target_squared / count):
        raise UserError(
            "the held-out segments all have the same reward, so that nothing can be explained; hold out more with "
            "config.data.validation_fraction"
        )
    left = missed_squared / count - (missed / count) ** 2
    return {"eval/value_loss": float(missed_squared / count), "eval/explained_variance": float(1.0 - left / variance)}


def _totals(sums: Callable[[Batch], tuple[Any, ...]], batches: Iterable[Batch]) -> list[np.ndarray]:
    parts = [tuple(np.asarray(part, np.float64) for part in sums(batch)) for batch in batches]
    return [np.sum(column, axis=0) for column in zip(*parts, strict=True)]
