"""A run on disk: its directory and lock, checkpoints with their manifests, and the copy in object storage.

May import storage, parallel, pretrained (its safetensors reader), model and the method; only `orbax` imports jax.
"""
