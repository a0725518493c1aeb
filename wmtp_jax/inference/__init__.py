"""Continuing prompts: the model unrolled with its caches, decoding with drafts, sampling, prompts of any length.

May import model and tokenizer, and jax.
"""
