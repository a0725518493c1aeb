"""A model as its structure and a nested dict of arrays, which is what updates, checkpoints and references hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from wmtp_jax.model.transformer import Model
from wmtp_jax.settings import ModelSettings
from wmtp_jax.trainable import Trainable

Parameters = dict[str, Any]


def merge(definition: nnx.GraphDef, parameters: Parameters) -> Model:
    """The model with these parameters; cheap, made inside the traced functions."""
    return nnx.merge(definition, nnx.State(parameters))


def split(model: Model) -> tuple[nnx.GraphDef, Parameters]:
    """A model as its structure and a nested dict of arrays."""
    definition, state = nnx.split(model)
    return definition, nnx.to_pure_dict(state)


def initial_parameters(
    settings: ModelSettings,
    seed: int,
    *,
    value_head: bool = False,
    shardings: Callable[[Parameters], Any] = lambda parameters: None,
) -> tuple[nnx.GraphDef, Parameters]:
    """A model's structure and random parameters, a function of the seed alone.

    `shardings` says of their shapes where they are to lie, so that no device ever holds all; None: on one device.
    """
    definition, abstract = abstract_parameters(settings, value_head=value_head)
    make = jax.jit(
        lambda seed: split(Model(settings, rngs=nnx.Rngs(jax.random.key(seed)), value_head=value_head))[1],
        out_shardings=shardings(abstract),
    )
    # A number of the host: it is the same in every process, where an array would lie on a device of one.
    return definition, make(np.uint32(seed))


def abstract_parameters(settings: ModelSettings, *, value_head: bool = False) -> tuple[nnx.GraphDef, Parameters]:
    """A model's structure and its parameters' shapes and types, without making them."""
    return split(nnx.eval_shape(lambda: Model(settings, rngs=nnx.Rngs(0), value_head=value_head)))


def flatten(parameters: Parameters) -> dict[str, Any]:
    """The inverse of `nest`."""
    return traverse_util.flatten_dict(parameters, sep=".")


def separate(parameters: Parameters, trainable: Trainable) -> tuple[Parameters, Parameters]:
    """What is trained and what is frozen; a parameter of which only a part is trained is in both, see `unite`."""
    named = flatten(parameters)
    return nest(trainable.trained(named)), nest(trainable.frozen(named))


def unite(trained: Parameters, frozen: Parameters) -> Parameters:
    """The parameters that `separate` took apart."""
    trained, frozen = flatten(trained), flatten(frozen)
    both = {name: jnp.concatenate([frozen[name], trained[name]]) for name in trained.keys() & frozen.keys()}
    return nest({**frozen, **trained, **both})


def nest(named: Mapping[str, Any]) -> Parameters:
    """`{"layers.mlp.up.kernel": x} -> {"layers": {"mlp": {"up": {"kernel": x}}}}`."""
    tree: Parameters = {}
    for name, leaf in named.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
