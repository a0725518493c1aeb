"""What both backends' weighting libraries check of their arguments, and the axes of a scope; shapes and plain numbers only."""

from __future__ import annotations

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


def check_temperature(temperature: float) -> None:
    """Refuses a plain number that is not positive."""
    if isinstance(temperature, Real) and not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
