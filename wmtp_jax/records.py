"""What an update returns, the same in both backends, and the metrics that become of it."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

Array = Any  # of either backend


class WeightedLoss(NamedTuple):
    """What an update is made of.

    Attributes:
      loss: Σ m w CE / Σ m, a scalar.
      value_loss: of the critic, a scalar; 0 without one.
      gradients: of `loss + coefficient * value_loss`, a tree like the parameters.
      losses, weights: of every entry, `[B, S, H]`.
    """

    loss: Array
    value_loss: Array
    gradients: dict[str, Any]
    losses: Array
    weights: Array


class StepMetrics(NamedTuple):
    """Scalars of one update (float32; `ce_head [H]`), `finite` a bool: whether the update was made."""

    loss: Array
    ce_head: Array
    value_loss: Array
    weight_entropy: Array
    effective_sample_fraction: Array
    grad_norm: Array
    finite: Array

    def named(self, *, learning_rate: float, critic: bool) -> dict[str, float]:
        """By the names of metrics.jsonl; waits for the device."""
        scalars = ["loss", *(["value_loss"] if critic else []), "weight_entropy", "effective_sample_fraction", "grad_norm"]
        heads = {f"train/ce_head_{k}": value for k, value in enumerate(self.ce_head.tolist())}
        named = {f"train/{name}": float(getattr(self, name)) for name in scalars}
        return {**named, **heads, "train/learning_rate": learning_rate}


def masked_head_means(arrays: ModuleType, loss: Array, mask: Array) -> Array:
    """Unweighted mean of `loss [..., S, H]` over the valid entries of every head, `[H]`; 0 for a head without any."""
    axes = tuple(range(mask.ndim - 1))
    return arrays.where(mask, loss, 0.0).sum(axes) / arrays.clip(mask.sum(axes), 1, None)


def step_metrics(
    arrays: ModuleType, library: ModuleType, done: WeightedLoss, mask: Array, *, grad_norm: Array, finite: Array
) -> StepMetrics:
    """What an update is judged by. `arrays` is `jax.numpy` or `torch`, `library` the `weighting` module of that backend."""
    return StepMetrics(
        loss=done.loss,
        ce_head=masked_head_means(arrays, done.losses, mask),
        value_loss=done.value_loss,
        weight_entropy=library.weight_entropy(done.weights, mask),
        effective_sample_fraction=library.effective_sample_fraction(done.weights, mask),
        grad_norm=grad_norm,
        finite=finite,
    )


class ValueMetrics(NamedTuple):
    """Scalars of one update of a value head alone (float32), `finite` a bool: whether the update was made."""

    value_loss: Array
    grad_norm: Array
    finite: Array

    def named(self, *, learning_rate: float) -> dict[str, float]:
        """By the names of metrics.jsonl; waits for the device."""
        named = {f"train/{name}": float(getattr(self, name)) for name in ("value_loss", "grad_norm")}
        return {**named, "train/learning_rate": learning_rate}


class ValueSums(NamedTuple):
    """Sums over the rewarded tokens of a batch, scalars: how many, and the first two moments of the discounted reward and of
    what the value misses of it."""

    count: Array
    target: Array
    target_squared: Array
    missed: Array
    missed_squared: Array
