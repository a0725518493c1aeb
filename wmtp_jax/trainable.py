"""Which parameters a run trains: all, the new heads alone, or low-rank adapters on the trunk beside the new heads.

An adapter (LoRA, arXiv 2106.09685) adds `scale * (x A) B` to a projection `x W` of a trunk layer: A `[in, r]` is `lora_down`,
random at first, B `[r, out]` is `lora_up`, zero at first, `scale` = alpha / r. Whoever reads a checkpoint gets W + scale A B.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

DOWN, UP = "lora_down", "lora_up"


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What a run trains.

    Attributes:
      parts: all | heads (the new ones; head 0 stays as it is) | lora (adapters on the trunk's layers, and the new heads).
      head_kind: of the model.
    """

    parts: str = "all"
    head_kind: str = "linear"

    def first(self, name: str) -> int | None:
        """From which index on a parameter is trained: None where it is frozen, 0 where it is trained as a whole.

        `block` heads are stacked with head 0, the trunk's last layer, in front.
        """
        if self.parts == "all" or name.startswith("value_head."):
            return 0
        if name.split(".")[0] == "heads":
            return 1 if self.head_kind == "block" else 0
        return 0 if self.parts == "lora" and name.endswith((DOWN, UP)) else None

    def trained(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The trained parts of parameters by dotted name: the arrays themselves, or what lies from an index on."""
        starts = {name: self.first(name) for name in named}
        return {n: named[n] if start == 0 else named[n][start:] for n, start in starts.items() if start is not None}

    def frozen(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The other parts."""
        starts = {name: self.first(name) for name in named}
        return {n: named[n] if start is None else named[n][:start] for n, start in starts.items() if start != 0}


ALL = Trainable()


def fresh_adapters(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Adapters that change nothing yet, for those of these names that are such: the same numbers in both backends."""
    for name, shape in shapes.items():
        if name.endswith(DOWN):
            noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
            yield name, noise * np.float32(shape[-2] ** -0.5)
        elif name.endswith(UP):
            yield name, np.zeros(shape, np.float32)


def merge_adapters(named: Mapping[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """Parameters without adapters, which are added to the kernels that they belong to: `W + scale A B`, float32."""
    merged = {name: array for name, array in named.items() if not name.endswith((DOWN, UP))}
    for name, down in named.items():
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            merged[f"{module}kernel"] = merged[f"{module}kernel"] + np.float32(scale) * (down @ named[f"{module}{UP}"])
    return merged
