"""Columns kept beside the tokens of a corpus: a reference's losses and entropies, rewards.

May import data, storage, tokenizer, settings and errors; no jax.
"""
