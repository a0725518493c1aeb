"""WMTP: language models whose every position predicts the next H tokens, with a weight for every one of them.

This package is the primary backend (JAX). Importing it, or any of its modules that `wmtp_torch` shares, loads no jax.
"""
