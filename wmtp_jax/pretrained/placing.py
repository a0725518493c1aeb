"""Published weights on devices: the only part of this package that imports jax."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx, traverse_util

from wmtp_jax.model import Model
from wmtp_jax.pretrained.pages import own_pages
from wmtp_jax.pretrained.published import Published, parameters, with_heads

_ALIGNMENT = 64  # bytes; an aligned array is taken over without a copy


def place(published: Published, *, num_heads: int = 1, head_kind: str = "linear", dtype: str = "float32") -> Model:
    """The model with its parameters in place, float32.

    Tensors come one at a time and go straight into the parameter they are part of; a parameter moves to the device as
    soon as it is whole. Peak host memory is the model and one tensor where the host is the device, and one parameter
    and one tensor elsewhere.

    Args:
      published: an opened source.
      num_heads: H.
      head_kind: linear | block | sequential; `published.parameters` says where new heads start.
      dtype: the compute type, float32 | bfloat16.
    """
    settings = with_heads(published.settings, num_heads=num_heads, head_kind=head_kind, where=published.path)
    settings = dataclasses.replace(settings, compute_dtype=dtype)
    definition, state = nnx.split(nnx.eval_shape(lambda: Model(settings, rngs=nnx.Rngs(0))))
    wanted = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep=".")
    stream = parameters(published, num_heads=num_heads, head_kind=head_kind)
    placed = {}
    for path, pieces in itertools.groupby(stream, key=lambda item: _parameter(item[0])):
        shape = wanted[path].shape
        placed[path] = jax.device_put(_gather(path, pieces, shape))
    if placed.keys() != wanted.keys():
        raise AssertionError(f"parameters left out or made twice: {sorted(placed.keys() ^ wanted.keys())}")
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(placed, sep="."))
    return nnx.merge(definition, state)


def _parameter(name: str) -> str:
    """The parameter that a tensor is part of: its name without the index."""
    return re.sub(r"^(layers|heads)\.\d+", r"\1", name)


def _gather(path: str, pieces: Iterator[tuple[str, np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
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
