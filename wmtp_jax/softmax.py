"""What the losses of both backends share: the tiles that logits are made in, and the arithmetic of a softmax in parts.

Shapes, plain numbers, and arrays of either backend, see `backends.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from wmtp_jax.backends import namespace_of

Array = Any  # of either backend

# Tokens and vocabulary entries of one tile of logits. 4 MiB in float32 stays in the cache of a CPU, and the matrix
# products are large enough to run at full speed. An accelerator wants larger ones: a product of 1,024 x 1,024 is 64 blocks of
# 128 x 128, fewer than an H100 has units (132), one of 4,096 x 4,096 is 1,024 of them, in 64 MiB.
CHUNK = 1024
TILE = 1024
ACCELERATED = 4
# Logits up to this many elements (16 MiB in float32) are one tile: small models pay for no loop.
SINGLE_TILE = 1 << 22


class TokenStatistics(NamedTuple):
    """What the softmax says about each token: arrays of the shape of the targets, float32 or better."""

    loss: Array
    entropy: Array
    squared_probability_sum: Array


class Softmax(NamedTuple):
    """What a part of the vocabulary knows about each token's softmax, `[tokens]` each; parts merge in any order.

    With d = z - maximum and e = exp(d): sums of e, e d and e², and the logit of the target, 0 where the target lies in
    another part. Entropy from e d (never positive) and a normalizer (never below 1) can't cancel or turn negative.
    """

    maximum: Array
    normalizer: Array
    weighted_shift: Array
    squared_sum: Array
    target_logit: Array


def rescale(softmax: Softmax, maximum: Array) -> Softmax:
    """The same part about a `maximum` that is at least its own."""
    shift = softmax.maximum - maximum
    scale = namespace_of(shift).exp(shift)
    return Softmax(
        maximum,
        scale * softmax.normalizer,
        scale * (softmax.weighted_shift + shift * softmax.normalizer),
        scale * scale * softmax.squared_sum,
        softmax.target_logit,
    )


def merge(left: Softmax, right: Softmax) -> Softmax:
    """Two parts as one (the online softmax of arXiv 1805.02867)."""
    maximum = namespace_of(left.maximum).maximum(left.maximum, right.maximum)
    left, right = rescale(left, maximum), rescale(right, maximum)
    return Softmax(maximum, *(a + b for a, b in zip(left[1:], right[1:], strict=True)))


def finish(softmax: Softmax) -> TokenStatistics:
    """Loss, entropy and squared probability sum from the softmax over the whole vocabulary."""
    log_normalizer = namespace_of(softmax.normalizer).log(softmax.normalizer)
    loss = log_normalizer + (softmax.maximum - softmax.target_logit)
    entropy = log_normalizer - softmax.weighted_shift / softmax.normalizer
    return TokenStatistics(loss, entropy, softmax.squared_sum / softmax.normalizer**2)


def tiling(tokens: int, vocabulary: int, chunk_size: int | None, *, accelerated: bool = False) -> tuple[int, int]:
    """The tokens and the vocabulary entries of a tile, as even as can be; at most `chunk_size` tokens, None by the shapes and by
    whether an accelerator makes the products."""
    factor = ACCELERATED if accelerated else 1
    if chunk_size is None:
        chunk_size = tokens if tokens * vocabulary <= SINGLE_TILE else CHUNK * factor
    if tokens <= chunk_size and tokens * vocabulary <= SINGLE_TILE:
        return tokens, vocabulary
    chunk = math.ceil(tokens / math.ceil(tokens / chunk_size))
    even = math.ceil(vocabulary / math.ceil(vocabulary / (TILE * factor)))
    return chunk, min(vocabulary, math.ceil(even / 64) * 64)  # 64: whole vectors and matrix fragments


def check_arguments(hidden: Array, unembedding: Array, targets: Array, chunk_size: int | None) -> tuple[int, int]:
    """Refuses arguments of `losses.token_statistics` whose shapes do not fit; returns the numbers of tokens and of heads."""
    *heads, width, _ = unembedding.shape
    rows = tuple(targets.shape[: targets.ndim - len(heads)])
    if len(heads) > 1 or tuple(targets.shape) != (*rows, *heads) or tuple(hidden.shape) != (*rows, width):
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden.shape)}, unembedding {tuple(unembedding.shape)}, "
            f"targets {tuple(targets.shape)}; expected [..., D], [D, V], [...] or [..., D], [H, D, V], [..., H]"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: expected 1 or more tokens, or None")
    return math.prod(rows), math.prod(heads)
