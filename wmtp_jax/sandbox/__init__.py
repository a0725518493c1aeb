"""Programs nobody has read, run in a process that can harm nothing, and judged against their tests.

Imports errors and nothing else of ours; no jax.
"""
