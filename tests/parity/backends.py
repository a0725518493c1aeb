"""Both backends behind one call on NumPy arrays, and the deviations from the reference that the suite has seen."""

from __future__ import annotations

import functools
import importlib

import jax
import numpy as np
import pytest
import torch

from tests.parity_table import DEVIATIONS, DIFFERENCES

# Relative to max(1, |expected|) for elementwise functions, to the scale of the input for recurrences.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6}
RECURRENCE_TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


class JaxBackend:
    """Functions of `wmtp_jax.<module>`, jitted once for each set of hyperparameters."""

    name = "jax"
    types = ("float64", "float32")

    @staticmethod
    @functools.cache
    def _jitted(module, function, hyperparameters):
        return jax.jit(functools.partial(_function("wmtp_jax", module, function), **dict(hyperparameters)))

    def call(self, function, *arrays, module="weighting", jit=True, **hyperparameters):
        """The result as NumPy; float64 arrays are computed in float64."""
        with jax.enable_x64(_is_float64(arrays)):
            if jit:
                return np.asarray(self._jitted(module, function, tuple(hyperparameters.items()))(*arrays))
            return np.asarray(
                _function("wmtp_jax", module, function)(*map(jax.numpy.asarray, arrays), **hyperparameters)
            )

    def gradient(self, objective, x):
        """d objective(backend module, x) / dx."""
        with jax.enable_x64(_is_float64([x])):
            module = importlib.import_module("wmtp_jax.weighting")
            return np.asarray(jax.jit(jax.grad(lambda x: objective(module, x)))(x))

    def array(self, x):
        return jax.numpy.asarray(x)


class TorchBackend:
    """Functions of `wmtp_torch.<module>` on one device."""

    def __init__(self, device="cpu"):
        self.device = device
        self.name = "torch" if device == "cpu" else f"torch-{device}"
        self.types = ("float32",) if device == "mps" else ("float64", "float32")

    def call(self, function, *arrays, module="weighting", jit=False, **hyperparameters):
        """The result as NumPy."""
        del jit
        result = _function("wmtp_torch", module, function)(*map(self.array, arrays), **hyperparameters)
        assert not result.requires_grad
        return result.cpu().numpy()

    def gradient(self, objective, x):
        """d objective(backend module, x) / dx."""
        x = self.array(x).requires_grad_()
        value = objective(importlib.import_module("wmtp_torch.weighting"), x)
        # A value that doesn't depend on x has no graph; its gradient is 0.
        return torch.autograd.grad(value, x)[0].cpu().numpy() if value.requires_grad else np.zeros(x.shape)

    def array(self, x):
        return torch.from_numpy(np.array(x)).to(self.device)


def _function(package, module, name):
    return getattr(importlib.import_module(f"{package}.{module}"), name)


def _is_float64(arrays):
    return any(np.asarray(a).dtype == np.float64 for a in arrays)


BACKENDS = [pytest.param(JaxBackend(), id="jax"), pytest.param(TorchBackend(), id="torch")]
if torch.backends.mps.is_available():
    BACKENDS.append(pytest.param(TorchBackend("mps"), id="torch-mps", marks=pytest.mark.mps))
if torch.cuda.is_available():
    BACKENDS.append(pytest.param(TorchBackend("cuda"), id="torch-cuda", marks=pytest.mark.gpu))

BACKENDS_AND_TYPES = [
    pytest.param(backend.values[0], dtype, id=f"{backend.id}-{dtype}", marks=backend.marks)
    for backend in BACKENDS
    for dtype in backend.values[0].types
]


def check(function, backend, dtype, actual, expected, *, scale=None, tolerance=None):
    """Asserts that `actual` is as close to `expected` as its type allows, and notes how close.

    Args:
      function: the name in the table.
      backend: one of `BACKENDS`.
      dtype: name of the type that the result must have.
      actual: from the backend.
      expected: float64, from the reference.
      scale: of the input, for recurrences; None for max(1, |expected|) of each entry.
      tolerance: instead of the usual one.
    """
    if tolerance is None:
        tolerance = (TOLERANCE if scale is None else RECURRENCE_TOLERANCE)[dtype]
    assert actual.dtype == dtype
    assert actual.shape == np.shape(expected)
    distance = np.abs(np.asarray(actual, np.float64) - expected)
    # NaN is no number below the tolerance, so it fails here.
    deviation = np.max(distance / (np.maximum(1.0, np.abs(expected)) if scale is None else scale), initial=0.0)
    key = (function, backend.name, dtype)
    DEVIATIONS[key] = (np.fmax(deviation, DEVIATIONS.get(key, (0.0, 0.0))[0]), tolerance)
    assert deviation <= tolerance, f"{function}: {deviation:.2e} > {tolerance:.0e}\n{actual}\n{expected}"


def check_equal(label, torch_array, jax_array, *, tolerance):
    """Asserts that both backends computed the same, relative to the largest entry of JAX's array, and notes how nearly."""
    assert torch_array.dtype == jax_array.dtype == np.float32
    assert torch_array.shape == jax_array.shape
    difference = np.abs(torch_array.astype(np.float64) - jax_array).max() / np.abs(jax_array).max()
    DIFFERENCES[label] = (np.fmax(difference, DIFFERENCES.get(label, (0.0, 0.0))[0]), tolerance)
    assert difference <= tolerance, f"{label}: {difference:.2e} > {tolerance:.0e}"
