"""The critic: what a value function learns, and what its values say of tokens. One home for both backends.

Pure functions of `[B, S]` arrays of either backend, see `backends.py`.

V[t] is the expected reward of a segment after its first t + 1 tokens. The reward of a segment stands at its last token, and
beyond it V is 0; so with a discount of 1 the value of a whole segment is its reward.
"""

from __future__ import annotations

from typing import Any

from wmtp_jax.backends import namespace_of, stop_gradient, weighting_of
from wmtp_jax.settings import Critic
from wmtp_jax.update import ValueSums

Array = Any  # of either backend


def token_score(values: Array, rewards: Array, segment_ids: Array, *, critic: Critic) -> Array:
    """What every token did to the expected reward, token-indexed `[B, S]`.

    value_change: `V[t] - discount V[t-1]`; advantage: the generalized advantage of the state before the token.
    """
    weighting = weighting_of(values)
    match critic.score:
        case "value_change":
            return weighting.value_change(values, segment_ids, discount=critic.discount)
        case "advantage":
            advantage = weighting.generalized_advantage(
                rewards, values, segment_ids, discount=critic.discount, decay=critic.decay
            )
            return weighting.token_advantage(advantage, segment_ids)
    raise ValueError(f"score {critic.score!r}: must be value_change or advantage")


def lambda_returns(values: Array, rewards: Array, segment_ids: Array, *, discount: float, decay: float) -> Array:
    """`G[t] = A[t] + V[t]`, A the generalized advantage (arXiv 1506.02438, section 3); `[B, S]`.

    With `decay` 1 it is the discounted reward itself, whatever the values are.
    """
    weighting = weighting_of(values)
    advantage = weighting.generalized_advantage(rewards, values, segment_ids, discount=discount, decay=decay)
    return namespace_of(values).where(segment_ids > 0, advantage + values, 0.0)


def value_loss(
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
      values: `[B, S]`; the only operand that a gradient reaches.
      rewards: `[B, S]`, a segment's reward at its last token, 0 elsewhere.
      rewarded: `[B, S]` bool, the tokens of segments that have a reward.
      segment_ids: `[B, S]`.
      critic: discount and decay.
      denominator: rewarded tokens of the whole batch, of which this may be a part; a float scalar.
    """
    arrays = namespace_of(values)
    # The returns are made of the values, but are what these are to become: a constant.
    constant = stop_gradient(values)
    returns = lambda_returns(constant, rewards, segment_ids, discount=critic.discount, decay=critic.decay)
    error = arrays.where(rewarded, values - returns, 0.0)
    return (error * error).sum() / arrays.clip(denominator, 1.0, None)


def value_sums(
    values: Array, rewards: Array, rewarded: Array, segment_ids: Array, *, discount: float
) -> ValueSums:
    """What `evaluation.metrics.value_metrics` is made from; arguments as in `value_loss`.

    Against the reward itself and not the λ-return, which the values are a part of: values of 0 would be near to theirs.
    """
    arrays = namespace_of(values)
    target = lambda_returns(arrays.zeros_like(values), rewards, segment_ids, discount=discount, decay=1.0)
    missed = target - values

    def total(x: Array) -> Array:
        return arrays.where(rewarded, x, 0.0).sum()

    return ValueSums(rewarded.sum(), total(target), total(target**2), total(missed), total(missed**2))
