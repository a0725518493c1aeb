"""Which backend an array belongs to: one rule for what the backends share.

What works on the arrays of one backend is written once for each, name for name: `weighting`, `losses`, `model`, `optimizer`,
`train_step`. What composes such functions, or is arithmetic that `jax.numpy` and `torch` spell alike, is written once:
`algorithms`, `critic`, `softmax`, `update`. It finds its backend by its arrays, as functions of the array API standard do
(`array_namespace`, https://data-apis.org/array-api), so that a caller never says which.
"""

from __future__ import annotations

from typing import Any

Array = Any  # of either backend


def is_torch(array: Array) -> bool:
    """Whether an array is a tensor of PyTorch; all others, traced ones and NumPy's included, are for JAX."""
    return type(array).__module__.partition(".")[0] == "torch"


def namespace_of(array: Array) -> Any:
    """`torch` or `jax.numpy`."""
    if is_torch(array):
        import torch as namespace
    else:
        import jax.numpy as namespace
    return namespace


def weighting_of(array: Array):
    """The weighting library of the array's backend."""
    if is_torch(array):
        from wmtp_torch import weighting
    else:
        from wmtp_jax import weighting
    return weighting


def stop_gradient(array: Array) -> Array:
    """The array as a constant."""
    if is_torch(array):
        return array.detach()
    from jax import lax

    return lax.stop_gradient(array)
