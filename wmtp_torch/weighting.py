"""Scores and weights: how much each (position, head) term of a multi-token-prediction loss matters.

A score says how much a token matters, in whatever unit; a weight multiplies its cross-entropy. Scores that are made per
token come first to the (position, head) that predicts the token, then a weight function turns them into weights:

    weights = top_fraction(excess_loss(loss, reference_loss), mask, fraction=0.7, scope="head")
    weights = exponential(align_to_heads(value_change(values, segment_ids, discount=1.0), num_heads=4), mask, ...)

Everything here is a pure function of arrays; hyperparameters are keywords. The same functions exist for jax and for torch.

Shapes: S positions, H heads, any leading axes. `[..., S]` is per token, `[..., S, H]` per (position, head): entry (s, k)
belongs to the target x[s + 1 + k]. `mask [..., S, H]` is non-zero where there is such a target. `segment_ids [..., S]` numbers
the documents of a packed row: neighbours with the same id are one segment, 0 is padding; a 0/1 mask is the one-segment case.

Time: token-indexed arrays hold at t something about token x[t]; state-indexed ones hold at t something about the choice of
x[t + 1] after x[<= t], and pass through `token_advantage` before `align_to_heads`.

Weights are non-negative, carry no gradient and have a masked mean of 1 within each scope:

    position  the H heads of one position
    sequence  one row, all its heads
    batch     every entry of the array
    head      every entry of one head, over all rows and positions

Edges: a scope without valid entries gives zeros; a scope whose weights sum to 0 gives uniform weights; constant scores
standardise to 0. NaN or infinity behind the mask or in padding reaches neither value nor gradient; a NaN that counts
stays NaN, so that it is noticed.

Types: at least float32 (bfloat16 is computed in float32, integers in the default float type); float64 stays float64.

Arguments, the same everywhere: `scores`, `loss` (nats), `token_entropy` (nats), `weights` and `mask` are `[..., S, H]`; `values`,
`rewards`, `advantage` and `segment_ids` are `[..., S]`. `scope` is that within which entries compete and weights have mean one. A
function of such arrays returns their shape; what a docstring below adds is what differs.

Errors: ValueError for shapes that differ or have too few axes, an unknown scope, and hyperparameters outside their bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from wmtp_jax import checks
from wmtp_jax.checks import Scope, check_interval, check_rank, check_same_shape, check_temperature, scope_axes

Array = torch.Tensor


# ---- alignment -----------------------------------------------------------------------------------------------------


def align_to_heads(values: Array, *, num_heads: int, fill: float = 0.0) -> Array:
    """Brings per-token values to the (position, head) that predicts the token.

    out[s, k] = values[s + 1 + k], and `fill` where s + 1 + k >= S. Head 0 is the ordinary next-token head.

    Args:
      values: `[..., S]`, token-indexed, any type.
      num_heads: H, at least 1; may exceed S.
      fill: for targets past the end.

    Returns:
      `[..., S, H]` in the type of `values`.
    """
    values = torch.as_tensor(values)
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, not {num_heads}")
    check_rank("values", values, 1, "[..., S]")
    length = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, num_heads), value=fill)
    return torch.stack([padded[..., 1 + k : 1 + k + length] for k in range(num_heads)], dim=-1)


# ---- scores --------------------------------------------------------------------------------------------------------


def excess_loss(loss: Array, reference_loss: Array, *, signed: bool = True, threshold: float = 0.0) -> Array:
    """What a token costs this model beyond what it costs a reference model: what is left to learn about it.

    d = loss - reference_loss, or |d|; entries with |d| < threshold become 0.
    Source: Rho-1, arXiv 2404.07965.

    Args:
      loss, reference_loss: nats, any shape, about the same targets.
      signed: False for the absolute value, which also favours tokens that the reference finds harder.
      threshold: nats, non-negative.
    """
    loss, reference_loss = _as_float(loss), _as_float(reference_loss)
    check_same_shape(loss=loss, reference_loss=reference_loss)
    check_interval(0.0, math.inf, threshold=threshold)
    difference = loss - reference_loss
    if not signed:
        # Not abs, whose derivative at a NaN behind a mask is NaN.
        difference = torch.where(difference < 0, -difference, difference)
    return torch.where(difference.abs() < threshold, 0.0, difference)


def value_change(values: Array, segment_ids: Array, *, discount: float) -> Array:
    """How far token x[t] moved the expected return; token-indexed.

    out[t] = V[t] - discount * V[t-1], with V[t-1] = 0 at a segment's first token; 0 in padding.

    Args:
      values: V[t] is the value after x[<= t].
      discount: in [0, 1].
    """
    values = _in_segments(values, segment_ids)
    check_interval(0.0, 1.0, discount=discount)
    return values - discount * _previous(values, segment_ids)


def td_error(rewards: Array, values: Array, segment_ids: Array, *, discount: float) -> Array:
    """One-step temporal-difference error; state-indexed.

    out[t] = r[t] + discount * V[t+1] - V[t], with V[t+1] = 0 at a segment's last token; 0 in padding.

    Args:
      rewards: r[t] is the reward for the choice made at t.
      values: V[t] is the value after x[<= t].
      discount: in [0, 1].
    """
    rewards, values = _in_segments(rewards, segment_ids), _in_segments(values, segment_ids)
    check_interval(0.0, 1.0, discount=discount)
    return rewards + discount * _next(values, segment_ids) - values


def generalized_advantage(rewards: Array, values: Array, segment_ids: Array, *, discount: float, decay: float) -> Array:
    """Generalized advantage estimation, GAE(discount, decay), within segments; state-indexed.

    A[t] = td[t] + discount * decay * A[t+1], with A[t+1] = 0 at a segment's last token; 0 in padding. `td` is `td_error`.
    The λ-return is A[t] + V[t].
    Source: arXiv 1506.02438.

    Args:
      rewards, values, discount: as in `td_error`; discount is γ.
      decay: λ, in [0, 1].
    """
    error = td_error(rewards, values, segment_ids, discount=discount)
    check_interval(0.0, 1.0, decay=decay)
    carry = discount * decay * _next(torch.ones_like(error), segment_ids)

    # Pairs (c, a) stand for the map A -> a + c A. After each step entry t holds the composition of twice as many maps, so
    # log S steps do, where a loop would take S; products of c only shrink.
    advantage, step, length = error, 1, error.shape[-1]
    while step < length:
        advantage = advantage + carry * torch.nn.functional.pad(advantage[..., step:], (0, step))
        carry = carry * torch.nn.functional.pad(carry[..., step:], (0, step))
        step *= 2
    return advantage


def token_advantage(advantage: Array, segment_ids: Array) -> Array:
    """From the state that chose a token to the token: state-indexed to token-indexed.

    out[t] = advantage[t-1]; 0 at a segment's first token and in padding.
    """
    return _previous(_in_segments(advantage, segment_ids), segment_ids)


def group_advantage(rewards: Array, *, epsilon: float = 1e-6) -> Array:
    """Advantage of each sample over the other samples for the same prompt.

    out = (r - mean) / (std + epsilon) over the last axis, with the population std; exactly 0 where all rewards are equal.
    Source: GRPO in DeepSeekMath, arXiv 2402.03300.

    Args:
      rewards: `[..., G]`, G samples of one prompt.
      epsilon: non-negative, in the unit of the rewards.
    """
    rewards = _as_float(rewards)
    check_rank("rewards", rewards, 1, "[..., G]")
    check_interval(0.0, math.inf, epsilon=epsilon)
    lowest = rewards.amin(dim=-1, keepdim=True)
    equal = rewards.amax(dim=-1, keepdim=True) == lowest
    # Distances from the lowest keep their digits where the rewards share a large offset, and are exactly 0 where all are equal.
    distance = rewards - lowest.detach()
    centred = distance - distance.mean(dim=-1, keepdim=True)
    std = _safe_sqrt((centred**2).mean(dim=-1, keepdim=True))
    return torch.where(equal, 0.0, centred / torch.where(equal, 1.0, std + epsilon))


def logit_gradient_norm(target_probability: Array, squared_probability_sum: Array) -> Array:
    """Length of the gradient of a token's cross-entropy in the logits, from 0 to sqrt(2).

    The gradient is p - onehot(y), so its length is sqrt(max(Σp² - 2 p_y + 1, 0)). Σp² and p_y in float32 leave an absolute
    uncertainty of 3e-4 near p_y = 1, where the terms cancel.

    Args:
      target_probability: p_y, any shape.
      squared_probability_sum: Σp² over the vocabulary, the same shape.
    """
    probability, squared_sum = _as_float(target_probability), _as_float(squared_probability_sum)
    check_same_shape(target_probability=probability, squared_probability_sum=squared_sum)
    # In this order both differences are exact near p_y = 1, so that the cancellation adds no error of its own.
    return _safe_sqrt(torch.clamp((squared_sum - probability) + (1.0 - probability), min=0.0))


# ---- weights -------------------------------------------------------------------------------------------------------


def uniform(mask: Array) -> Array:
    """Every valid entry weighs 1: plain multi-token prediction."""
    return _masked(torch.ones_like(_as_float(mask)), mask)[0]


def softmax_over_heads(scores: Array, mask: Array, *, temperature: float) -> Array:
    """Moves weight between the heads of one position, never between positions.

    w[s, k] = n[s] * softmax_k(scores[s, k] / temperature) over the n[s] valid heads of position s.

    Args:
      temperature: positive, in the unit of the scores; uniform weights as it grows.
    """
    scores, mask = _masked(scores, mask)
    temperature = check_temperature(temperature)
    return _mean_one_exp(scores, mask, scope_axes("position", mask.ndim), temperature)


def exponential(scores: Array, mask: Array, *, temperature: float, low: float, high: float, scope: Scope) -> Array:
    """Weights that grow exponentially with the standardised score, within bounds.

    z = (score - mean) / std over the scope (population std); w ∝ clip(exp(z / temperature), low, high), mean one.
    Source: the clipped exponential advantage of AWR, arXiv 1910.00177.

    Args:
      temperature: positive, in standard deviations; uniform weights as it grows.
      low, high: bounds before the mean is made one, 0 <= low <= high; `high` may be infinite.
    """
    scores, mask = _masked(scores, mask)
    axes = scope_axes(scope, mask.ndim)
    temperature = check_temperature(temperature)
    # Clipping the exponent instead of the exponential: an outlier's score can't overflow.
    exponent = torch.clamp(_standardize(scores, mask, axes) / temperature, *checks.log_limits(low, high))
    return _mean_one_exp(exponent, mask, axes)


def top_fraction(scores: Array, mask: Array, *, fraction: float, scope: Scope) -> Array:
    """Keeps the best-scored entries of each scope and drops the rest.

    The best ceil(fraction * n) of a scope's n valid entries weigh n / n_kept, the rest 0. `fraction` is read in thousandths
    and the count is integer arithmetic: f = round(1000 fraction), n = 1000 q + r, n_kept = f q + (f r + 999) // 1000. Ties go
    to the lower flat index, and -0.0 ties with 0.0. A fraction of 0 keeps nothing, which gives uniform weights.
    Source: selective language modelling in Rho-1, arXiv 2404.07965.

    Args:
      scores: may be infinite; a NaN that counts gives NaN.
      fraction: in [0, 1].
    """
    scores, mask = _masked(scores, mask)
    axes = scope_axes(scope, mask.ndim)
    check_interval(0.0, 1.0, fraction=fraction)
    thousandths = round(fraction * 1000)
    valid = _count(mask, axes)
    keep = thousandths * (valid // 1000) + (thousandths * (valid % 1000) + 999) // 1000

    # No sort: the score of rank `keep` is found bit by bit, each bit by counting the entries that reach a candidate.
    bits = _ordered_bits(scores)
    lowest = torch.iinfo(bits.dtype).min
    bits = torch.where(mask, bits, lowest)

    def enough(candidate: Array) -> Array:
        return _count(bits >= candidate, axes) >= keep

    # The highest bit is the sign: where enough scores are 0 or more the search starts at 0, else at the lowest integer.
    start = torch.where(enough(torch.zeros_like(keep)), 0, lowest).to(bits.dtype)
    threshold = _largest(enough, start, num_bits=torch.iinfo(bits.dtype).bits - 1)

    # Scores that tie at the threshold: the lower flat indices are kept, found by the same search over indices.
    above = bits > threshold
    wanted = keep - _count(above, axes)
    extent = [size if axis in axes else 1 for axis, size in enumerate(mask.shape)]
    index = torch.arange(math.prod(extent), dtype=torch.int32, device=mask.device).reshape(extent)
    tie_index = torch.where(mask & (bits == threshold), index, torch.iinfo(torch.int32).max)

    def few_enough(candidate: Array) -> Array:
        return _count(tie_index < candidate, axes) <= wanted

    end = _largest(few_enough, torch.zeros_like(wanted), num_bits=math.prod(extent).bit_length())
    kept = (above | (tie_index < end)).to(scores.dtype)
    return torch.where(torch.isnan(scores), scores, _mean_one(kept, mask, axes))


def confidence(loss: Array, mask: Array, *, scope: Scope) -> Array:
    """Favours tokens that the model already finds likely.

    w ∝ exp(-loss), the target's probability.
    Source: DFT, arXiv 2508.05629.
    """
    loss, mask = _masked(loss, mask)
    return _mean_one_exp(-loss, mask, scope_axes(scope, mask.ndim))


def focal(loss: Array, mask: Array, *, gamma: float, scope: Scope) -> Array:
    """Favours tokens that the model finds unlikely.

    w ∝ (1 - exp(-loss))^gamma, the probability of any other token, to a power.
    Source: focal loss, arXiv 1708.02002.

    Args:
      gamma: non-negative; 0 gives uniform weights.
    """
    loss, mask = _masked(loss, mask)
    axes = scope_axes(scope, mask.ndim)
    check_interval(0.0, math.inf, gamma=gamma)
    # Rounding can leave a loss just below 0, and a negative base has no power.
    missing = -torch.expm1(-torch.clamp(loss, min=0.0))
    return _mean_one(missing**gamma, mask, axes)


def entropy(token_entropy: Array, mask: Array, *, scope: Scope) -> Array:
    """Favours tokens at which the model is undecided.

    w ∝ the entropy of the predictive distribution, in nats; below 0 (rounding) counts as 0.
    Source: EAFT, arXiv 2601.02151.
    """
    return normalize(token_entropy, mask, scope=scope)


def head_decay(mask: Array, *, decay: float, scope: Scope) -> Array:
    """Trusts distant heads less, or more.

    w[s, k] ∝ decay^k. Under `head` scope every head has mean one by itself, so the weights are uniform.

    Args:
      decay: non-negative; 1 gives uniform weights.
    """
    ones = uniform(mask)
    check_interval(0.0, math.inf, decay=decay)
    heads = torch.arange(ones.shape[-1], dtype=ones.dtype, device=ones.device)
    return normalize(ones * decay**heads, mask, scope=scope)


def combine(weights: Array, mask: Array, *, coefficients: Sequence[float], scope: Scope) -> Array:
    """Weighted geometric mean of several weights.

    w ∝ Π_i weights[i]^(c_i / Σc), mean one. An entry that one member with c_i > 0 drops is dropped.

    Args:
      weights: `[n, ..., S, H]`.
      coefficients: n non-negative numbers, not all 0; a member with coefficient 0 has no say.
    """
    weights, mask = torch.as_tensor(weights), torch.as_tensor(mask)
    product = 1.0
    for member, share in zip(weights, checks.shares(coefficients, weights, mask), strict=True):
        product = product * _masked(member, mask)[0] ** share
    return normalize(product, mask, scope=scope)


def permute(weights: Array, mask: Array, noise: Array, *, groups: Array | None = None) -> Array:
    """The same weights on other tokens: a control that any claim must beat.

    The i-th valid entry in flat order gets the weight of the valid entry whose noise has rank i (ties: the lower flat index).
    With `groups` that holds within each group, so that weights stay in their sequence, head or kind of token.

    Args:
      noise: `[..., S, H]`, random numbers.
      groups: `[..., S, H]` integers, the same for entries among which weights are dealt out; None: all are one group.
    """
    noise, _ = _masked(noise, mask)
    weights, mask = _masked(weights, mask)
    groups = torch.zeros_like(mask, dtype=torch.int32) if groups is None else torch.as_tensor(groups, device=mask.device)
    check_same_shape(mask=mask, groups=groups)
    flat = weights.reshape(-1)
    outside, group = (~mask).reshape(-1).to(torch.int32), groups.reshape(-1)

    def ordered(order: Array) -> Array:
        order = order[torch.argsort(group[order], stable=True)]
        return order[torch.argsort(outside[order], stable=True)]

    # Valid entries first, group by group: once by their noise, once by their index. What stands at one place in the first order
    # gives its weight to what stands there in the second.
    source = ordered(torch.argsort(noise.reshape(-1), stable=True))
    target = ordered(torch.arange(mask.numel(), device=mask.device))
    dealt = torch.zeros_like(flat).index_copy(0, target, flat[source])
    return torch.where(mask, dealt.reshape(mask.shape), 0.0)


def normalize(weights: Array, mask: Array, *, scope: Scope) -> Array:
    """Scales weights to a masked mean of one.

    out = weights / mean(weights) over the valid entries of each scope; a weight below 0 counts as 0.
    """
    weights, mask = _masked(weights, mask)
    return _mean_one(torch.clamp(weights, min=0.0), mask, scope_axes(scope, mask.ndim))


# ---- diagnostics ---------------------------------------------------------------------------------------------------


def effective_sample_fraction(weights: Array, mask: Array) -> Array:
    """Kish's effective sample size as a fraction of the valid entries; a scalar.

    (Σw)² / (n Σw²): 1 for uniform weights, 1 / n where one entry has all the weight, 0 where there is no weight at all.
    """
    weights, mask = _masked(weights, mask)
    axes = scope_axes("batch", mask.ndim)
    total, squares = weights.sum(dim=axes), (weights**2).sum(dim=axes)
    none = squares == 0
    return torch.where(none, 0.0, total**2 / torch.where(none, 1.0, mask.sum() * squares))


def weight_entropy(weights: Array, mask: Array) -> Array:
    """How evenly weight is spread over the heads of a position; a scalar.

    The mean of -Σ_k p_k log(p_k) / log(n), p_k = w_k / Σw, over positions with n >= 2 valid heads and some weight: 1 for
    uniform weights, 0 where one head has it all or where there is no such position.
    """
    weights, mask = _masked(weights, mask)
    valid, total = _count(mask, (-1,)), weights.sum(dim=-1, keepdim=True)
    counts = (valid >= 2) & (total != 0)
    share = torch.where(counts, weights / torch.where(counts, total, 1.0), 0.0)
    nats = -(share * torch.log(torch.where(share == 0, 1.0, share))).sum(dim=-1, keepdim=True)
    relative = nats / torch.log(torch.where(counts, valid, 2).to(weights.dtype))
    return relative.sum() / torch.clamp(counts.sum(), min=1)


# ---- shared --------------------------------------------------------------------------------------------------------


def _as_float(x: Array) -> Array:
    x = torch.as_tensor(x)
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return x.to(torch.promote_types(dtype, torch.float32))


def _masked(values: Array, mask: Array) -> tuple[Array, Array]:
    """Float values without gradient, 0 behind the mask whatever was there, and the mask as bool; both `[..., S, H]`."""
    values, mask = _as_float(values), torch.as_tensor(mask)
    check_same_shape(mask=mask, values=values)
    check_rank("mask", mask, 2, "[..., S, H]")
    mask = mask != 0
    return torch.where(mask, values.detach(), 0.0), mask


def _count(where: Array, axes: tuple[int, ...]) -> Array:
    return where.sum(dim=axes, keepdim=True, dtype=torch.int32)


def _mean(values: Array, mask: Array, axes: tuple[int, ...]) -> Array:
    """Mean of `values`, 0 behind the mask, over the valid entries; 0 where there are none."""
    count = torch.clamp(_count(mask, axes), min=1).to(values.dtype)
    return values.sum(dim=axes, keepdim=True) / count


def _mean_one(weights: Array, mask: Array, axes: tuple[int, ...]) -> Array:
    """`weights / mean`, 1 where the mean is 0, 0 behind the mask."""
    weights = torch.where(mask, weights, 0.0)
    mean = _mean(weights, mask, axes)
    return torch.where(mask, torch.where(mean == 0, 1.0, weights / torch.where(mean == 0, 1.0, mean)), 0.0)


def _mean_one_exp(scores: Array, mask: Array, axes: tuple[int, ...], temperature: float = 1.0) -> Array:
    """`exp(scores / temperature)` with mean one. Only differences count: the largest score is taken off first, so that nothing
    overflows and what all scores share costs no digits."""
    largest = torch.where(mask, scores, -math.inf).amax(dim=axes, keepdim=True)
    largest = torch.where(torch.isfinite(largest), largest, 0.0)
    return _mean_one(torch.exp(torch.where(mask, (scores - largest) / temperature, 0.0)), mask, axes)


def _standardize(scores: Array, mask: Array, axes: tuple[int, ...]) -> Array:
    """`(scores - mean) / std` over the valid entries; 0 where they are all equal."""
    lowest = torch.where(mask, scores, math.inf).amin(dim=axes, keepdim=True)
    spread = torch.where(mask, scores, -math.inf).amax(dim=axes, keepdim=True) - lowest
    # Standard scores don't change when scores are mapped to [0, 1] first. There equal scores are exactly 0, a large common
    # offset costs no digits and no square overflows.
    equal = spread <= 0
    unit = torch.where(mask & ~equal, (scores - lowest) / torch.where(equal, 1.0, spread), 0.0)
    centred = torch.where(mask, unit - _mean(unit, mask, axes), 0.0)
    std = torch.sqrt(_mean(centred**2, mask, axes))
    return centred / torch.where(equal, 1.0, std)


def _ordered_bits(x: Array) -> Array:
    """The bits of floats as signed integers in the same order; both zeros become 0, nothing becomes the lowest integer."""
    dtype = torch.int64 if x.dtype == torch.float64 else torch.int32
    bits = x.view(dtype)
    return torch.where(bits < 0, -(bits & torch.iinfo(dtype).max), bits)


def _largest(holds: Callable[[Array], Array], start: Array, *, num_bits: int) -> Array:
    """The largest integer in [start, start + 2^num_bits) up to which `holds` is true, elementwise, given that it is at start."""
    x = start
    for bit in reversed(range(num_bits)):
        candidate = x + (1 << bit)
        x = torch.where(holds(candidate), candidate, x)
    return x


def _in_segments(values: Array, segment_ids: Array) -> Array:
    """Float values `[..., S]`, 0 in padding whatever was there."""
    values, segment_ids = _as_float(values), torch.as_tensor(segment_ids)
    check_same_shape(segment_ids=segment_ids, values=values)
    check_rank("segment_ids", segment_ids, 1, "[..., S]")
    return torch.where(segment_ids != 0, values, 0.0)


def _joined(segment_ids: Array) -> Array:
    """Whether t and t + 1 lie in one segment, `[..., S - 1]`."""
    segment_ids = torch.as_tensor(segment_ids)
    return (segment_ids[..., 1:] == segment_ids[..., :-1]) & (segment_ids[..., 1:] != 0)


def _previous(values: Array, segment_ids: Array) -> Array:
    """`values[t - 1]`, 0 where t - 1 is not in the segment of t."""
    before = torch.where(_joined(segment_ids), values[..., :-1], 0.0)
    return torch.nn.functional.pad(before, (1, 0))


def _next(values: Array, segment_ids: Array) -> Array:
    """`values[t + 1]`, 0 where t + 1 is not in the segment of t."""
    after = torch.where(_joined(segment_ids), values[..., 1:], 0.0)
    return torch.nn.functional.pad(after, (0, 1))


def _safe_sqrt(x: Array) -> Array:
    """Square root of x >= 0 whose derivative at 0 is 0, not infinite."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, x)))
