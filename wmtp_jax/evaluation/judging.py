"""Judging by the name that evaluations know it by; see `wmtp_jax.sandbox.judging`."""

from wmtp_jax.sandbox.judging import failure, same_output

__all__ = ["failure", "same_output"]
