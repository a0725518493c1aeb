"""The algorithms: which score each makes of what, and how it becomes a weight. One `match` for both backends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from wmtp_jax.settings import Weighting

Array = Any  # of either backend
TokenStatistics = Any  # `losses.TokenStatistics` of either backend


def token_weights(
    arrays: ModuleType,
    library: ModuleType,
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
      arrays: `jax.numpy` or `torch`.
      library: the `weighting` module of that backend.
      settings: which weights.
      statistics: `[B, S, H]` each.
      mask: `[B, S, H]`.
      reference_loss: `[B, S, H]`, for the rho1 algorithms.
      reference_entropy: `[B, S, H]`, for those of them whose score reads it.
      token_score: `[B, S]`, token-indexed, for the critic.
    """
    loss = statistics.loss
    match settings.algorithm:
        case "baseline-mtp":
            return library.uniform(mask)
        case "rho1-weighted" | "rho1-tokenskip":
            default = "exponential" if settings.algorithm == "rho1-weighted" else "top_fraction"
            match settings.score:
                case "excess_loss":
                    score = library.excess_loss(loss, reference_loss, signed=settings.signed, threshold=settings.threshold)
                case "reference_loss":
                    score = arrays.negative(reference_loss)
                case "reference_entropy":
                    score = arrays.negative(reference_entropy)
                case "reference_both":
                    options = {"fraction": settings.fraction, "scope": settings.scope}
                    by_loss, by_entropy = (
                        library.top_fraction(arrays.negative(x), mask, **options) for x in (reference_loss, reference_entropy)
                    )
                    return library.normalize(by_loss * by_entropy, mask, scope=settings.scope)
                case _:
                    raise ValueError(f"score {settings.score!r}: must be one of config.REFERENCE_SCORES")
            return _weights_from_score(library, score, mask, settings, default=default)
        case "critic-wmtp":
            score = token_score if settings.signed else arrays.abs(token_score)
            score = library.align_to_heads(score, num_heads=mask.shape[-1])
            return _weights_from_score(library, score, mask, settings, default="exponential")
        case "gradient":
            score = library.logit_gradient_norm(arrays.exp(-loss), statistics.squared_probability_sum)
            return _weights_from_score(library, score, mask, settings, default="exponential")
        case "confidence":
            return library.confidence(loss, mask, scope=settings.scope)
        case "focal":
            return library.focal(loss, mask, gamma=settings.gamma, scope=settings.scope)
        case "entropy":
            return library.entropy(statistics.entropy, mask, scope=settings.scope)
        case "head-decay":
            # Within one head it would be uniform, so the widest scope that holds several heads stands for `head`.
            scope = "batch" if settings.scope == "head" else settings.scope
            return library.head_decay(mask, decay=settings.decay, scope=scope)
        case "hybrid":
            members = [
                token_weights(arrays, library, dataclasses.replace(settings, algorithm=member), statistics, mask)
                for member in settings.members
            ]
            # As above: mean one in every head would undo a member that moves weight between heads.
            scope = "batch" if settings.scope == "head" and "head-decay" in settings.members else settings.scope
            return library.combine(arrays.stack(members), mask, coefficients=settings.coefficients, scope=scope)
    raise ValueError(f"algorithm {settings.algorithm!r}: has no weights here")


def reference_entries(
    library: ModuleType,
    of_tokens: Callable[..., Sequence[Array]],
    of_heads: Callable[..., Sequence[Array]],
    reference: Any,
    batch: dict[str, Array],
    *,
    settings: Weighting,
    chunk_size: int | None = None,
) -> dict[str, Array]:
    """What the weights read of the reference by (position, head), `[B, S, H]` each and without gradient: the columns
    `settings.reference_columns`, `reference_loss` about the target and `reference_entropy` of the distribution that predicts it.

    Those that the batch brings, aligned to heads. Else the reference computes them: by `next_token`, for target x[s+1+k] from its
    own prefix x[<= s+k]; by `same_prefix`, from x[<= s] and the reference's own head k.

    Args:
      library: the `weighting` module of a backend.
      of_tokens: reference, batch -> loss and entropy by token, `[B, S]` each: `reference_token_statistics` of that backend.
      of_heads: reference, batch -> loss and entropy of its own heads, `[B, S, H]` each.
      reference: as the backend holds it; None where the batch brings the columns, or none are read.
      batch: see `Batch` of the backend.
      settings: which weights.
      chunk_size: tokens whose logits are held at once.
    """
    names = settings.reference_columns
    if not names:
        return {}
    brings = names[0] in batch
    if not brings and settings.alignment == "same_prefix":
        return dict(zip(names, of_heads(reference, batch, chunk_size=chunk_size), strict=False))
    by_token = [batch[name] for name in names] if brings else of_tokens(reference, batch, chunk_size=chunk_size)
    heads = batch["mask"].shape[-1]
    return {name: library.align_to_heads(x, num_heads=heads) for name, x in zip(names, by_token, strict=False)}


def _weights_from_score(library: ModuleType, score: Array, mask: Array, settings: Weighting, *, default: str) -> Array:
    form = default if settings.form == "default" else settings.form
    match form:
        case "exponential":
            return library.exponential(
                score,
                mask,
                temperature=settings.temperature,
                low=settings.low,
                high=settings.high,
                scope=settings.scope,
            )
        case "top_fraction":
            return library.top_fraction(score, mask, fraction=settings.fraction, scope=settings.scope)
        case "softmax_over_heads":
            return library.softmax_over_heads(score, mask, temperature=settings.softmax_temperature)
    raise ValueError(f"form {form!r}: must be exponential, top_fraction or softmax_over_heads")
