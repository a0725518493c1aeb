"""Published weights on devices: the only part of this package that imports jax."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx, traverse_util

from wmtp_jax.model import Model
from wmtp_jax.pretrained.gathering import gather
from wmtp_jax.pretrained.published import Published, with_heads


def place(published: Published, *, num_heads: int = 1, head_kind: str = "linear", dtype: str = "float32") -> Model:
    """The model with its parameters in place, float32.

    A parameter moves to the device as soon as it is whole. Peak host memory is the model and one tensor where the host is
    the device, and one parameter and one tensor elsewhere.

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
    shapes = {name: leaf.shape for name, leaf in wanted.items()}
    whole = gather(published, shapes, num_heads=num_heads, head_kind=head_kind)
    placed = {name: jax.device_put(array) for name, array in whole}
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(placed, sep="."))
    return nnx.merge(definition, state)
