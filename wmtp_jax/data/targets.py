"""The target shift: the one place where tokens become targets for H heads, with their masks and positions."""

from __future__ import annotations

import numpy as np


def shift_targets(
    tokens: np.ndarray, segment_ids: np.ndarray, *, num_heads: int, loss_mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Shifts tokens into the targets of every head and says which of them count.

    `targets[b, s, k] = tokens[b, s + 1 + k]`; `mask[b, s, k]` is True where s + 1 + k < S, the target is not padding,
    it lies in the segment of position s, and `loss_mask[b, s + 1 + k]` allows it. Head 0 is the next-token head.

    Args:
      tokens: int `[B, S]`.
      segment_ids: int `[B, S]`, the document that a position belongs to; 0 is padding.
      num_heads: H, at least 1; may exceed S.
      loss_mask: `[B, S]`, non-zero for the tokens that may be targets (not for a prompt, say); None: all may.

    Returns:
      targets int32 `[B, S, H]`, the token whether it counts or not and 0 past the row's end, and mask bool `[B, S, H]`.

    Raises:
      ValueError: shapes that differ, or fewer than one head.
    """
    tokens, segment_ids = np.asarray(tokens), np.asarray(segment_ids)
    allowed = segment_ids != 0
    if loss_mask is not None:
        loss_mask = np.asarray(loss_mask)
        if loss_mask.shape != tokens.shape:
            raise ValueError(f"loss_mask has shape {loss_mask.shape}, tokens {tokens.shape}")
        allowed = allowed & (loss_mask != 0)
    if segment_ids.shape != tokens.shape or tokens.ndim == 0:
        raise ValueError(f"segment_ids has shape {segment_ids.shape}, tokens {tokens.shape}: both must be [B, S]")
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}: must be at least 1")
    length = tokens.shape[-1]
    targets = np.zeros((*tokens.shape, num_heads), np.int32)
    mask = np.zeros((*tokens.shape, num_heads), bool)
    for head in range(min(num_heads, length - 1)):
        shift = head + 1
        targets[..., : length - shift, head] = tokens[..., shift:]
        same_segment = segment_ids[..., shift:] == segment_ids[..., : length - shift]
        mask[..., : length - shift, head] = same_segment & allowed[..., shift:]
    return targets, mask


def positions(segment_ids: np.ndarray) -> np.ndarray:
    """Positions `[B, S]` int32 that count from 0 in every segment; 0 in padding.

    Args:
      segment_ids: int `[B, S]`; a segment is a run of equal ids, 0 is padding.
    """
    segment_ids = np.asarray(segment_ids)
    index = np.broadcast_to(np.arange(segment_ids.shape[-1], dtype=np.int32), segment_ids.shape)
    starts = np.zeros(segment_ids.shape, bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=-1)
    return np.where(segment_ids != 0, index - first, 0).astype(np.int32)
