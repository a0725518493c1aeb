"""The arbiter: the weighting library as literal loops over float64 numbers, straight from the equations.

Nothing here is vectorised and nothing is shared with the two backends. Where they shift exponents, bisect or scan, this
file divides, sorts and recurs. Scopes are built as lists of indices; the mask decides what is looked at at all.
"""

from __future__ import annotations

import math

import numpy as np


def align_to_heads(values, *, num_heads, fill=0.0):
    length = values.shape[-1]
    out = np.zeros((*values.shape, num_heads), np.float64)
    for row in np.ndindex(values.shape[:-1]):
        for s in range(length):
            for k in range(num_heads):
                out[(*row, s, k)] = values[(*row, s + 1 + k)] if s + 1 + k < length else fill
    return out


def excess_loss(loss, reference_loss, *, signed=True, threshold=0.0):
    out = np.zeros(loss.shape, np.float64)
    for i in np.ndindex(loss.shape):
        difference = float(loss[i]) - float(reference_loss[i])
        if abs(difference) < threshold:
            out[i] = 0.0
        else:
            out[i] = difference if signed else abs(difference)
    return out


def _neighbour(array, segment_ids, row, t, other):
    """`array[row][other]` where `other` is a real position in the segment of t, else 0."""
    if not 0 <= other < array.shape[-1] or segment_ids[(*row, t)] == 0:
        return 0.0
    return float(array[(*row, other)]) if segment_ids[(*row, other)] == segment_ids[(*row, t)] else 0.0


def value_change(values, segment_ids, *, discount):
    out = np.zeros(values.shape, np.float64)
    for *row, t in np.ndindex(values.shape):
        if segment_ids[(*row, t)] != 0:
            out[(*row, t)] = float(values[(*row, t)]) - discount * _neighbour(values, segment_ids, row, t, t - 1)
    return out


def td_error(rewards, values, segment_ids, *, discount):
    out = np.zeros(values.shape, np.float64)
    for *row, t in np.ndindex(values.shape):
        if segment_ids[(*row, t)] != 0:
            following = _neighbour(values, segment_ids, row, t, t + 1)
            out[(*row, t)] = float(rewards[(*row, t)]) + discount * following - float(values[(*row, t)])
    return out


def generalized_advantage(rewards, values, segment_ids, *, discount, decay):
    errors = td_error(rewards, values, segment_ids, discount=discount)
    out = np.zeros(values.shape, np.float64)
    for row in np.ndindex(values.shape[:-1]):
        for t in reversed(range(values.shape[-1])):
            if segment_ids[(*row, t)] != 0:
                out[(*row, t)] = errors[(*row, t)] + discount * decay * _neighbour(out, segment_ids, row, t, t + 1)
    return out


def token_advantage(advantage, segment_ids):
    out = np.zeros(advantage.shape, np.float64)
    for *row, t in np.ndindex(advantage.shape):
        out[(*row, t)] = _neighbour(advantage, segment_ids, row, t, t - 1)
    return out


def group_advantage(rewards, *, epsilon=1e-6):
    out = np.zeros(rewards.shape, np.float64)
    for row in np.ndindex(rewards.shape[:-1]):
        group = [float(r) for r in rewards[row]]
        if max(group) == min(group):
            continue
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group))
        for i, r in enumerate(group):
            out[(*row, i)] = (r - mean) / (std + epsilon)
    return out


def logit_gradient_norm(target_probability, squared_probability_sum):
    out = np.zeros(target_probability.shape, np.float64)
    for i in np.ndindex(out.shape):
        # fsum rounds once: the terms cancel near p = 1.
        square = math.fsum([float(squared_probability_sum[i]), -2.0 * float(target_probability[i]), 1.0])
        out[i] = math.sqrt(max(square, 0.0))
    return out


def _scopes(mask, scope):
    """The valid indices of every scope that has some, each list in flat order."""
    groups = {}
    for index in np.ndindex(mask.shape):
        *lead, s, k = index
        key = {"position": (*lead, s), "sequence": tuple(lead), "batch": (), "head": k}[scope]
        if mask[index]:
            groups.setdefault(key, []).append(index)
    return list(groups.values())


def _from_scopes(mask, scope, weights_of):
    """Fills every scope with `weights_of(indices)`, one number for each index, after making their mean one."""
    out = np.zeros(mask.shape, np.float64)
    for indices in _scopes(mask, scope):
        weights = weights_of(indices)
        total = math.fsum(weights)
        for index, weight in zip(indices, weights, strict=True):
            out[index] = 1.0 if total == 0 else len(indices) * (weight / total)
    return out


def uniform(mask):
    out = np.zeros(mask.shape, np.float64)
    for index in np.ndindex(mask.shape):
        out[index] = 1.0 if mask[index] else 0.0
    return out


def softmax_over_heads(scores, mask, *, temperature):
    def weights_of(indices):
        top = max(float(scores[i]) for i in indices)
        if top == -math.inf:
            return [0.0 for _ in indices]
        return [math.exp((float(scores[i]) - top) / temperature) for i in indices]

    return _from_scopes(mask, "position", weights_of)


def exponential(scores, mask, *, temperature, low, high, scope):
    def weights_of(indices):
        values = [float(scores[i]) for i in indices]
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        constant = max(values) == min(values)
        weights = []
        for v in values:
            z = 0.0 if constant else (v - mean) / std
            weights.append(min(max(math.exp(z / temperature), low), high))
        return weights

    return _from_scopes(mask, scope, weights_of)


def top_fraction(scores, mask, *, fraction, scope):
    def weights_of(indices):
        q, r = divmod(len(indices), 1000)
        f = round(fraction * 1000)
        keep = f * q + (f * r + 999) // 1000
        ranked = sorted(range(len(indices)), key=lambda i: (-float(scores[indices[i]]), i))
        kept = set(ranked[:keep])
        return [1.0 if i in kept else 0.0 for i in range(len(indices))]

    return _from_scopes(mask, scope, weights_of)


def confidence(loss, mask, *, scope):
    def weights_of(indices):
        # exp(-loss) over the largest of the scope: above 745 nats float64 itself has no exp(-loss).
        least = min(float(loss[i]) for i in indices)
        return [math.exp(least - float(loss[i])) for i in indices]

    return _from_scopes(mask, scope, weights_of)


def focal(loss, mask, *, gamma, scope):
    def weights_of(indices):
        return [(-math.expm1(-max(float(loss[i]), 0.0))) ** gamma for i in indices]

    return _from_scopes(mask, scope, weights_of)


def entropy(token_entropy, mask, *, scope):
    return _from_scopes(mask, scope, lambda indices: [max(float(token_entropy[i]), 0.0) for i in indices])


def head_decay(mask, *, decay, scope):
    return _from_scopes(mask, scope, lambda indices: [float(decay) ** i[-1] for i in indices])


def combine(weights, mask, *, coefficients, scope):
    def weights_of(indices):
        out = []
        for index in indices:
            product = 1.0
            for member, coefficient in enumerate(coefficients):
                product *= float(weights[(member, *index)]) ** (coefficient / sum(coefficients))
            out.append(product)
        return out

    return _from_scopes(mask, scope, weights_of)


def permute(weights, mask, noise, *, groups=None):
    members = {}
    for index in np.ndindex(mask.shape):
        if mask[index]:
            members.setdefault(0 if groups is None else int(groups[index]), []).append(index)
    out = np.zeros(mask.shape, np.float64)
    for valid in members.values():
        by_noise = sorted(range(len(valid)), key=lambda i: (float(noise[valid[i]]), i))
        for i, index in enumerate(valid):
            out[index] = weights[valid[by_noise[i]]]
    return out


def normalize(weights, mask, *, scope):
    return _from_scopes(mask, scope, lambda indices: [max(float(weights[i]), 0.0) for i in indices])


def effective_sample_fraction(weights, mask):
    valid = [float(weights[i]) for i in np.ndindex(mask.shape) if mask[i]]
    squares = math.fsum(w * w for w in valid)
    return np.float64(math.fsum(valid) ** 2 / (len(valid) * squares) if squares else 0.0)


def weight_entropy(weights, mask):
    fractions = []
    for indices in _scopes(mask, "position"):
        heads = [float(weights[i]) for i in indices]
        total = math.fsum(heads)
        if len(heads) >= 2 and total > 0:
            shares = [w / total for w in heads]
            fractions.append(-math.fsum(p * math.log(p) for p in shares if p > 0) / math.log(len(heads)))
    return np.float64(math.fsum(fractions) / len(fractions) if fractions else 0.0)
