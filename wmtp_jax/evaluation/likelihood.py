"""Unweighted cross-entropy of every head on held-out rows, and bits per byte of head 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmtp_jax.errors import UserError
from wmtp_jax.train_step import Batch, Parameters, head_statistics, merge

Array = jax.Array


def batch_sums(
    parameters: Parameters, batch: Batch, token_bytes: Array, *, definition: nnx.GraphDef, chunk_size: int | None = None
) -> tuple[Array, Array, Array]:
    """Sums over one batch: nats `[H]`, targets `[H]`, bytes of head 0's targets (scalar). `token_bytes [V]`."""
    loss = head_statistics(merge(definition, parameters), batch, chunk_size=chunk_size).loss
    mask = batch["mask"]
    head_0_bytes = jnp.where(mask[..., 0], token_bytes[batch["targets"][..., 0]], 0)
    return jnp.where(mask, loss, 0.0).sum(axis=(0, 1)), mask.sum(axis=(0, 1)), head_0_bytes.sum()


def evaluate(sums: Callable[[Batch], tuple[Any, Any, Any]], batches: Iterable[Batch]) -> dict[str, float]:
    """The evaluation metrics over all batches: every target counts once, whatever batch it is in.

    Args:
      sums: a batch to what `batch_sums` returns.
      batches: at least one with a target for every head.

    Returns:
      `eval/ce_head_{k}` in nats a token, `eval/ce_mean` over the heads, `eval/bits_per_byte` of head 0 (all bytes of its
      targets; a row's or segment's first token is no target and its bytes don't count).

    Raises:
      UserError: a head has no target at all.
    """
    # Summed in float64 on the host: a sum of 1e7 float32 losses would lose its last digits.
    parts = [tuple(np.asarray(part, np.float64) for part in sums(batch)) for batch in batches]
    nats, counts, head_0_bytes = (np.sum([part[i] for part in parts], axis=0) for i in range(3))
    if not counts.all() or not head_0_bytes:
        short = int(np.argmin(counts))
        raise UserError(
            f"the held-out rows have no target for head {short}: their texts are too short; hold out more with "
            "config.data.validation_fraction, or use fewer heads"
        )
    cross_entropy = nats / counts
    metrics = {f"eval/ce_head_{k}": float(value) for k, value in enumerate(cross_entropy)}
    metrics["eval/ce_mean"] = float(cross_entropy.mean())
    metrics["eval/bits_per_byte"] = float(nats[0] / head_0_bytes / math.log(2))
    return metrics
