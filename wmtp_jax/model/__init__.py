"""Decoder trunk, prediction heads and value head; needs only jax, flax and numpy."""

from wmtp_jax.model.parameters import Parameters, abstract_parameters, initial_parameters, merge, nest, split
from wmtp_jax.model.transformer import Model, segment_positions
from wmtp_jax.settings import ModelSettings

__all__ = [
    "Model", "ModelSettings", "Parameters", "abstract_parameters", "initial_parameters", "merge", "nest",
    "segment_positions", "split",
]  # fmt: skip
