"""The learning rate over time, and which parameters an update rule treats alike; for a backend without optax."""

from __future__ import annotations

import math
from collections.abc import Callable

from wmtp_jax.settings import Optimizer

# Tables and the heads' unembeddings: their rows are tokens, so Muon's orthogonal update does not suit them (Jordan et al. 2024).
TABLES = ("embedding", "position_embedding", "unembedding")


def make_schedule(settings: Optimizer, total_steps: int) -> Callable[[int], float]:
    """Step (0-based) -> factor in [0, 1] of the highest learning rate.

    Linear warm-up, then `cosine` to `final_fraction`, `wsd` (arXiv 2404.06395: stable, then a linear fall to
    `final_fraction` over the last `decay_fraction` of the run) or `constant`. A warm-up longer than half the run is cut
    to that, so that short tries of a recipe still reach its rate.
    """
    warmup = min(settings.warmup_steps, total_steps // 2)
    rest = max(total_steps - warmup, 1)
    decay = max(round(settings.decay_fraction * total_steps), 1)
    stable, final = max(rest - decay, 0), settings.final_fraction

    def factor(step: int) -> float:
        if step < warmup:
            # From 1/(warmup+1): a first step with rate 0 would be a step that learns nothing.
            return (step + 1) / (warmup + 1)
        match settings.schedule:
            case "cosine":
                return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min((step - warmup) / rest, 1)))
            case "wsd":
                return 1 - (1 - final) * min(max(step - warmup - stable, 0) / min(decay, rest), 1)
        return 1.0

    return factor


def parameter_kind(name: str) -> str:
    """`matrix`, `table` or `vector`: a matrix is a kernel `[in, out]`, or a stack of them; a table maps tokens or positions."""
    last = name.split(".")[-1]
    if last in TABLES or name == "heads":
        return "table"
    return "matrix" if last == "kernel" else "vector"
