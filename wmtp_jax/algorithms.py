"""The algorithms: which score each makes of what, and how it becomes a weight. One `match` for both backends."""

from __future__ import annotations

import dataclasses
from typing import Any

from wmtp_jax.backends import namespace_of, weighting_of
from wmtp_jax.settings import Weighting

Array = Any  # of either backend
TokenStatistics = Any  # `losses.TokenStatistics` of either backend


def token_weights(
    settings: Weighting,
    statistics: TokenStatistics,
    mask: Array,
    *,
    reference_loss: Array | None = None,
    reference_entropy: Array | None = None,
    token_score: Array | None = None,
) -> Array:
    """What every (position, head) term of the loss is worth, `[B, S, H]`: masked mean 1 in its scope, no gradient.

    Args:
      settings: which weights.
      statistics: `[B, S, H]` each.
      mask: `[B, S, H]`.
      reference_loss: `[B, S, H]`, for the rho1 algorithms.
      reference_entropy: `[B, S, H]`, for those of them whose score reads it.
      token_score: `[B, S]`, token-indexed, for the critic.
    """
    arrays, weighting, loss = namespace_of(mask), weighting_of(mask), statistics.loss
    match settings.algorithm:
        case "baseline-mtp":
            return weighting.uniform(mask)
        case "rho1-weighted" | "rho1-tokenskip":
            default = "exponential" if settings.algorithm == "rho1-weighted" else "top_fraction"
            match settings.score:
                case "excess_loss":
                    score = weighting.excess_loss(loss, reference_loss, signed=settings.signed, threshold=settings.threshold)
                case "reference_loss":
                    score = arrays.negative(reference_loss)
                case "reference_entropy":
                    score = arrays.negative(reference_entropy)
                case "reference_both":
                    kept: Array = 1.0
                    for column in (reference_loss, reference_entropy):
                        score = arrays.negative(column)
                        kept = kept * weighting.top_fraction(score, mask, fraction=settings.fraction, scope=settings.scope)
                    return weighting.normalize(kept, mask, scope=settings.scope)
                case _:
                    raise ValueError(f"score {settings.score!r}: must be one of config.REFERENCE_SCORES")
            return _weights_from_score(score, mask, settings, default=default)
        case "critic-wmtp":
            score = token_score if settings.signed else arrays.abs(token_score)
            score = weighting.align_to_heads(score, num_heads=mask.shape[-1])
            return _weights_from_score(score, mask, settings, default="exponential")
        case "gradient":
            score = weighting.logit_gradient_norm(arrays.exp(-loss), statistics.squared_probability_sum)
            return _weights_from_score(score, mask, settings, default="exponential")
        case "confidence":
            return weighting.confidence(loss, mask, scope=settings.scope)
        case "focal":
            return weighting.focal(loss, mask, gamma=settings.gamma, scope=settings.scope)
        case "entropy":
            return weighting.entropy(statistics.entropy, mask, scope=settings.scope)
        case "head-decay":
            # Within one head it would be uniform, so the widest scope that holds several heads stands for `head`.
            scope = "batch" if settings.scope == "head" else settings.scope
            return weighting.head_decay(mask, decay=settings.decay, scope=scope)
        case "hybrid":
            members = [
                token_weights(dataclasses.replace(settings, algorithm=member), statistics, mask)
                for member in settings.members
            ]
            # As above: mean one in every head would undo a member that moves weight between heads.
            scope = "batch" if settings.scope == "head" and "head-decay" in settings.members else settings.scope
            return weighting.combine(arrays.stack(members), mask, coefficients=settings.coefficients, scope=scope)
    raise ValueError(f"algorithm {settings.algorithm!r}: has no weights here")


def _weights_from_score(score: Array, mask: Array, settings: Weighting, *, default: str) -> Array:
    weighting = weighting_of(mask)
    form = default if settings.form == "default" else settings.form
    match form:
        case "exponential":
            return weighting.exponential(
                score,
                mask,
                temperature=settings.temperature,
                low=settings.low,
                high=settings.high,
                scope=settings.scope,
            )
        case "top_fraction":
            return weighting.top_fraction(score, mask, fraction=settings.fraction, scope=settings.scope)
        case "softmax_over_heads":
            return weighting.softmax_over_heads(score, mask, temperature=settings.softmax_temperature)
    raise ValueError(f"form {form!r}: must be exponential, top_fraction or softmax_over_heads")
