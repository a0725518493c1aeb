"""A whole model by single tensors, as the writers of published formats take it apart.

Names are those of `published.py`: `layers.{i}` counts every layer up to head 0's states, and `heads.{k}` are the heads after
it, k from 1. So a model with `block` heads has `layers.{L-1}`, which its parameters hold as the first of the stacked heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.pretrained.published import Shape
from wmtp_jax.settings import ModelSettings

# Shape, and what gives the array: nothing is copied before it is written.
Lazy = tuple[Shape, Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Whole:
    """A trained model, and what it came from.

    Attributes:
      path: of the checkpoint or the published weights, for messages.
      settings: of the model; adapters have been merged.
      named: parameters by dotted name, stacked, float32, without a value head.
      origin: what the checkpoint says of the published weights that it came from (`origins.describe_base`), or {}.
      end_of_text: id of the token that ends a text; None without a tokenizer.
      begin_of_text: id of the token that begins one, where the tokenizer names it.
      end_tokens: ids at which generation stops: those that the publisher lists, and `end_of_text`.
    """

    path: Path
    settings: ModelSettings
    named: Mapping[str, np.ndarray]
    origin: Mapping[str, Any]
    end_of_text: int | None = None
    begin_of_text: int | None = None
    end_tokens: tuple[int, ...] = ()

    def read(self, name: str) -> np.ndarray:
        """A tensor of the model, a view where it can be."""
        stack, _, rest = name.partition(".")
        if stack not in ("layers", "heads"):
            return self.named[name]
        index, _, path = rest.partition(".")
        number, block = int(index), self.settings.head_kind == "block"
        if stack == "layers" and block and number == self.settings.layers - 1:
            return self.named[f"heads.{path}"][0]
        if stack == "layers":
            return self.named[f"layers.{path}"][number]
        return self.named[f"heads.{path}" if path else "heads"][number if block else number - 1]

    def lazy(self, name: str, *, transposed: bool = False) -> Lazy:
        """The tensor with its shape, not yet copied."""
        shape = self.read(name).shape
        return (shape[::-1], lambda: self.read(name).T) if transposed else (shape, lambda: self.read(name))

    @property
    def extra_heads(self) -> range:
        """The heads after head 0."""
        return range(1, self.settings.num_heads)
