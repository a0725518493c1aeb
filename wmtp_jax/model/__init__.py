"""Decoder trunk, prediction heads and value head; needs only jax, flax and numpy."""

from wmtp_jax.model.parameters import (
    Parameters,
    abstract_parameters,
    flatten,
    initial_parameters,
    merge,
    nest,
    separate,
    split,
    unite,
)
from wmtp_jax.model.transformer import Model, segment_positions
from wmtp_jax.settings import ModelSettings

__all__ = [
    "Model", "ModelSettings", "Parameters", "abstract_parameters", "flatten", "initial_parameters", "merge", "nest",
    "segment_positions", "separate", "split", "unite",
]  # fmt: skip
