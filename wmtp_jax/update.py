"""What an update is given and what it returns, the same in both backends, and the metrics that become of it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from wmtp_jax.backends import namespace_of, weighting_of
from wmtp_jax.settings import Critic, Weighting
from wmtp_jax.trainable import ALL, Trainable

Array = Any  # of either backend


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an update minimises, and in which parameters.

    Attributes:
      weighting: which weights the terms of the loss get.
      alignment: of a reference to the heads, `next_token` or `same_prefix`; see `train_step.reference_entries`.
      critic: how the model's value head learns beside the heads, and what its values say; None: there is none.
      trainable: what the gradient is in; of the rest none is made.
      seed: of the random permutation of weights (`weighting.permute`).
      accumulation: parts that the rows of a batch go through in.
      chunk_size: tokens whose logits are held at once; None leaves it to the loss.
    """

    weighting: Weighting
    alignment: str = "next_token"
    critic: Critic | None = None
    trainable: Trainable = ALL
    seed: int = 0
    accumulation: int = 1
    chunk_size: int | None = None


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


def masked_head_means(loss: Array, mask: Array) -> Array:
    """Unweighted mean of `loss [..., S, H]` over the valid entries of every head, `[H]`; 0 for a head without any."""
    arrays, axes = namespace_of(loss), tuple(range(mask.ndim - 1))
    return arrays.where(mask, loss, 0.0).sum(axes) / arrays.clip(mask.sum(axes), 1, None)


def step_metrics(done: WeightedLoss, mask: Array, *, grad_norm: Array, finite: Array) -> StepMetrics:
    """What an update is judged by."""
    weighting = weighting_of(mask)
    return StepMetrics(
        loss=done.loss,
        ce_head=masked_head_means(done.losses, mask),
        value_loss=done.value_loss,
        weight_entropy=weighting.weight_entropy(done.weights, mask),
        effective_sample_fraction=weighting.effective_sample_fraction(done.weights, mask),
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
