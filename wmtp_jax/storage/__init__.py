"""Files that are not this run's: object storage, the cache, the Hugging Face hub; addresses without their passwords.

May import errors and nothing else of ours; no jax.
"""
