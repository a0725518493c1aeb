"""What both backends' weighting libraries check of their arguments, and the axes of a scope; shapes and plain numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

Scope = Literal["position", "sequence", "batch", "head"]


def scope_axes(scope: Scope, ndim: int) -> tuple[int, ...]:
    """Axes of a `[..., S, H]` array that one scope spans."""
    match scope:
        case "position":
            return (ndim - 1,)
        case "sequence":
            return (ndim - 2, ndim - 1)
        case "batch":
            return tuple(range(ndim))
        case "head":
            return tuple(range(ndim - 1))
    raise ValueError(f"scope must be position, sequence, batch or head, not {scope!r}")


def check_rank(name: str, x: Any, rank: int, shape: str) -> None:
    """Refuses an array with fewer than `rank` axes; `shape` is what it must be, in words."""
    if x.ndim < rank:
        raise ValueError(f"{name} must be {shape}, not {tuple(x.shape)}")


def check_same_shape(**arrays: Any) -> None:
    """Refuses arrays of different shapes."""
    if len({tuple(x.shape) for x in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in arrays.items())
        raise ValueError(f"shapes must be equal: {shapes}")


def check_interval(low: float, high: float, /, **hyperparameters: float) -> None:
    """Refuses plain numbers outside [low, high]. A traced one has no value yet; reading a tensor would wait for the device."""
    for name, value in hyperparameters.items():
        if isinstance(value, Real) and not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], not {value}")


def check_temperature(temperature: float) -> float:
    """The temperature, or 1e-30 where it is smaller: scores over less overflow float32, and devices take 1e-39 for 0.

    Refuses a plain number that is not positive.
    """
    if not isinstance(temperature, Real):
        return temperature
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    return max(temperature, 1e-30)


def shares(coefficients: Sequence[float], weights: Any, mask: Any) -> list[float]:
    """The coefficients of `combine` as fractions of their sum.

    Refuses `weights` that are not `[n, ..., S, H]` for this mask and n coefficients, and coefficients below 0 or all 0.
    """
    if tuple(weights.shape[1:]) != tuple(mask.shape) or len(coefficients) != weights.shape[0]:
        raise ValueError(
            f"weights {tuple(weights.shape)} must be [n, ..., S, H] for a mask {tuple(mask.shape)} and n = {len(coefficients)}"
            " coefficients"
        )
    check_interval(0.0, math.inf, **{f"coefficients[{i}]": c for i, c in enumerate(coefficients)})
    total = sum(coefficients)
    if total == 0:
        raise ValueError("coefficients must not all be 0")
    return [coefficient / total for coefficient in coefficients]


def log_limits(low: float, high: float) -> tuple[float, float]:
    """Logarithms of the limits that weights are clipped to; refuses limits below 0 or in the wrong order."""
    check_interval(0.0, math.inf, low=low, high=high)
    if low > high:
        raise ValueError(f"low must not exceed high, but {low} > {high}")
    lower, upper = (math.log(limit) if limit > 0 else -math.inf for limit in (low, high))
    return lower, upper
