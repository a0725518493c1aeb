"""The arbiter of the losses: literal loops over float64 numbers, straight from the equations.

Every token's probabilities are made in full, and the gradient is the one worked out by hand. Nothing here is shared with
the two backends.
"""

from __future__ import annotations

import math

import numpy as np


def _logits(state, unembedding):
    width, vocabulary = unembedding.shape
    return [math.fsum(float(state[d]) * float(unembedding[d, v]) for d in range(width)) for v in range(vocabulary)]


def _log_sum_exp(logits):
    largest = max(logits)
    return largest + math.log(math.fsum(math.exp(z - largest) for z in logits))


def _probabilities(logits):
    largest = max(logits)
    exponentials = [math.exp(z - largest) for z in logits]
    total = math.fsum(exponentials)
    return [e / total for e in exponentials]


def token_statistics(hidden, unembedding, targets):
    """`[N, D]`, `[D, V]`, `[N]` -> loss, entropy, Σp², `[N]` each."""
    loss, entropy, squared = (np.zeros(len(targets)) for _ in range(3))
    for n, target in enumerate(targets):
        logits = _logits(hidden[n], unembedding)
        loss[n] = _log_sum_exp(logits) - logits[target]
        for p in _probabilities(logits):
            entropy[n] -= p * math.log(p) if p > 0 else 0.0
            squared[n] += p * p
    return loss, entropy, squared


def loss_gradients(hidden, unembedding, targets, cotangent):
    """The gradients of `Σ_n cotangent[n] loss[n]` in `hidden` and `unembedding`.

    d loss / d z[v] = p[v] - (v = target), and z[v] = Σ_d h[d] W[d, v].
    """
    width, vocabulary = unembedding.shape
    d_hidden, d_unembedding = np.zeros(hidden.shape), np.zeros(unembedding.shape)
    for n, target in enumerate(targets):
        p = _probabilities(_logits(hidden[n], unembedding))
        for v in range(vocabulary):
            d_logit = float(cotangent[n]) * (p[v] - (1.0 if v == target else 0.0))
            for d in range(width):
                d_hidden[n, d] += d_logit * float(unembedding[d, v])
                d_unembedding[d, v] += d_logit * float(hidden[n, d])
    return d_hidden, d_unembedding


def weighted_mean(loss, weights, mask, *, denominator=None):
    total, count = 0.0, 0
    for i in np.ndindex(mask.shape):
        if mask[i]:
            total += float(weights[i]) * float(loss[i])
            count += 1
    divisor = count if denominator is None else denominator
    return total / divisor if divisor else 0.0


def weighted_mean_gradient(weights, mask, *, denominator=None):
    """d weighted_mean / d loss[i] = mask[i] weights[i] / Σ mask."""
    gradient = np.zeros(mask.shape)
    divisor = mask.sum() if denominator is None else denominator
    for i in np.ndindex(mask.shape):
        if mask[i] and divisor:
            gradient[i] = float(weights[i]) / divisor
    return gradient
