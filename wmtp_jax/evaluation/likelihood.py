"""Unweighted cross-entropy of every head on held-out rows, summed; `metrics.evaluate` makes the metrics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from wmtp_jax.model import Parameters, merge
from wmtp_jax.train_step import Batch, head_statistics

Array = jax.Array


def batch_sums(
    parameters: Parameters, batch: Batch, token_bytes: Array, *, definition: nnx.GraphDef, chunk_size: int | None = None
) -> tuple[Array, Array, Array]:
    """Sums over one batch: nats `[H]`, targets `[H]`, bytes of head 0's targets (scalar). `token_bytes [V]`."""
    loss = head_statistics(merge(definition, parameters), batch, chunk_size=chunk_size).loss
    mask = batch["mask"]
    head_0_bytes = jnp.where(mask[..., 0], token_bytes[batch["targets"][..., 0]], 0)
    return jnp.where(mask, loss, 0.0).sum(axis=(0, 1)), mask.sum(axis=(0, 1)), head_0_bytes.sum()
