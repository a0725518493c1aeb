"""Decoder trunk, prediction heads and value head; needs only jax, flax and numpy."""

from wmtp_jax.model.transformer import Model, segment_positions
from wmtp_jax.settings import ModelSettings

__all__ = ["Model", "ModelSettings", "segment_positions"]
