"""An experiment from its configuration to what it leaves behind: stages, one training, its loop, what is printed.

It reads the configuration and may import everything but commands; only `train` and `dry_run` import jax.
"""
