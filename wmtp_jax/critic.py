"""The critic: what a value function learns, and what its values say of tokens. One home for both backends.

Pure functions of `[B, S]` arrays; as in `algorithms.py`, their first arguments are the backend's: `arrays` is `jax.numpy` or
`torch`, `library` its `weighting` module.

V[t] is the expected reward of a segment after its first t + 1 tokens. The reward of a segment stands at its last token, and
beyond it V is 0; so with a discount of 1 the value of a whole segment is its reward.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from wmtp_jax.records import ValueSums
from wmtp_jax.settings import Critic

Array = Any  # of either backend


def token_score(library: ModuleType, values: Array, rewards: Array, segment_ids: Array, *, critic: Critic) -> Array:
    """What every token did to the expected reward, token-indexed `[B, S]`.

    value_change: `V[t] - discount V[t-1]`; advantage: the generalized advantage of the state before the token.
    """
    match critic.score:
        case "value_change":
            return library.value_change(values, segment_ids, discount=critic.discount)
        case "advantage":
            advantage = library.generalized_advantage(
                rewards, values, segment_ids, discount=critic.discount, decay=critic.decay
            )
            return library.token_advantage(advantage, segment_ids)
    raise ValueError(f"score {critic.score!r}: must be value_change or advantage")


def lambda_returns(
    arrays: ModuleType,
    library: ModuleType,
    values: Array,
    rewards: Array,
    segment_ids: Array,
    *,
    discount: float,
    decay: float,
) -> Array:
    """`G[t] = A[t] + V[t]`, A the generalized advantage (arXiv 1506.02438, section 3); `[B, S]`.

    With `decay` 1 it is the discounted reward itself, whatever the values are.
    """
    advantage = library.generalized_advantage(rewards, values, segment_ids, discount=discount, decay=decay)
    return arrays.where(segment_ids > 0, advantage + values, 0.0)


def value_loss(
    arrays: ModuleType,
    library: ModuleType,
    stop_gradient: Callable[[Array], Array],
    values: Array,
    rewards: Array,
    rewarded: Array,
    segment_ids: Array,
    *,
    critic: Critic,
    denominator: Array,
) -> Array:
    """Mean squared error of the values against their λ-returns over the rewarded tokens, a scalar.

    Args:
      arrays, library: the backend's.
      stop_gradient: an array as a constant; the returns are made of the values, but are what these are to become.
      values: `[B, S]`; the only operand that a gradient reaches.
      rewards: `[B, S]`, a segment's reward at its last token, 0 elsewhere.
      rewarded: `[B, S]` bool, the tokens of segments that have a reward.
      segment_ids: `[B, S]`.
      critic: discount and decay.
      denominator: rewarded tokens of the whole batch, of which this may be a part; a float scalar.
    """
    options = {"discount": critic.discount, "decay": critic.decay}
    returns = lambda_returns(arrays, library, stop_gradient(values), rewards, segment_ids, **options)
    error = arrays.where(rewarded, values - returns, 0.0)
    return (error * error).sum() / arrays.clip(denominator, 1.0, None)


def value_sums(
    arrays: ModuleType,
    library: ModuleType,
    values: Array,
    rewards: Array,
    rewarded: Array,
    segment_ids: Array,
    *,
    discount: float,
) -> ValueSums:
    """What `evaluation.metrics.value_metrics` is made from; arguments as in `value_loss`.

    Against the reward itself and not the λ-return, which the values are a part of: values of 0 would be near to theirs.
    """
    options = {"discount": discount, "decay": 1.0}
    target = lambda_returns(arrays, library, arrays.zeros_like(values), rewards, segment_ids, **options)
    missed = target - values

    def total(x: Array) -> Array:
        return arrays.where(rewarded, x, 0.0).sum()

    return ValueSums(rewarded.sum(), total(target), total(target**2), total(missed), total(missed**2))
