"""Pseudo-random orders that are a pure function of (key, index): no array of indices, no state to save."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

_ROUNDS = 6


@functools.lru_cache(maxsize=1024)
def _round_keys(key: tuple[int | str, ...]) -> np.ndarray:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, length: int, key: tuple[int | str, ...]) -> np.ndarray:
    """Where each index of `range(length)` goes in the permutation that `key` names, in O(1) memory.

    A balanced Feistel network over the next even power of two, walked along its cycle until it lands below `length`
    (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains"): fewer than four walks on average.

    Args:
      indices: int `[N]`, each in `[0, length)`.
      length: the size of the permuted range, 1 or more.
      key: what names the permutation, such as (seed, source, epoch).

    Returns:
      int64 `[N]`; over all indices, every value of `range(length)` once.
    """
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = _round_keys(key)
    values = np.array(indices, np.uint64)
    pending = np.arange(values.size)
    while pending.size:
        current = values[pending]
        left, right = current >> shift, current & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & low)
        values[pending] = current = (left << shift) | right
        pending = pending[current >= length]
    return values.astype(np.int64)
