"""Published tensors, one after the other, into whole parameters: what both backends place on their devices."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

import numpy as np

from wmtp_jax.pretrained.pages import own_pages
from wmtp_jax.pretrained.published import Published, Shape, parameters

_ALIGNMENT = 64  # bytes; XLA's CPU client takes an aligned array over without a copy


def gather(
    published: Published, shapes: Mapping[str, Shape], *, num_heads: int, head_kind: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of the model, whole, float32, by dotted name; see `published.parameters` for where new heads start.

    Tensors are read one at a time and go straight into the parameter that they are part of. Who drops each parameter
    before it asks for the next holds one parameter and one tensor.

    Args:
      published: an opened source.
      shapes: of the model's parameters by name.
      num_heads: H.
      head_kind: linear | block | sequential.
    """
    stream = parameters(published, num_heads=num_heads, head_kind=head_kind)
    made = set()
    for path, pieces in itertools.groupby(stream, key=lambda item: _parameter(item[0])):
        made.add(path)
        yield path, _gather(path, pieces, shapes[path])
    if made != shapes.keys():
        raise AssertionError(f"parameters left out or made twice: {sorted(made ^ shapes.keys())}")


def _parameter(name: str) -> str:
    """The parameter that a tensor is part of: its name without the index."""
    return re.sub(r"^(layers|heads)\.\d+", r"\1", name)


def _gather(path: str, pieces: Iterator[tuple[str, np.ndarray]], shape: Shape) -> np.ndarray:
    whole, filled = None, 0
    for name, array in pieces:
        if name == path and array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0:
            return array
        whole = own_pages(shape) if whole is None else whole
        target = whole if name == path else whole[filled]
        if target.shape != array.shape:
            raise AssertionError(f"{name}: {array.shape} read for {target.shape}")
        target[...] = array
        filled += 1
    if path.startswith(("layers", "heads")) and filled != shape[0]:
        raise AssertionError(f"{path}: {filled} of {shape[0]} parts")
    return whole
