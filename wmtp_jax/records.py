"""What an update returns, the same in both backends, and the metrics that become of it."""

from __future__ import annotations

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
