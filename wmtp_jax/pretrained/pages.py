"""Memory for large parameters."""

from __future__ import annotations

import math
import mmap

import numpy as np

# All pages at once, where the system can (Linux).
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)


def own_pages(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array of zeros in pages of its own.

    They are aligned, so that XLA's CPU client takes the array over without a copy, and not huge pages, whose first touch costs
    several times as much on virtual machines (0.2 s against 1.0 s for 500 MB).
    """
    count = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(4 * count, 1), flags=_FLAGS), np.float32, count).reshape(shape)
