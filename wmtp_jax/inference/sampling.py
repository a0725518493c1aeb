"""Choosing tokens: temperature, top-k and top-p, and the rejection sampling of drafts. Pure functions on logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Scalar = Array | float | int

# What a random number is for; each (row, position) has one of each.
_TOKEN, _ACCEPT, _DRAFT = range(3)


class Sampling(NamedTuple):
    """How to sample; in its place None takes the likeliest token.

    Attributes:
      temperature: above 0.
      top_k: keeps the k likeliest tokens; None for all.
      top_p: keeps, of these, the fewest likeliest that hold this share of the probability; None for all.
    """

    temperature: Scalar
    top_k: Scalar | None = None
    top_p: Scalar | None = None


class Randomness(NamedTuple):
    """Where random numbers come from: the same (seed, row, position) gives the same, whatever else is in the batch.

    Attributes:
      key: of the seed.
      rows: `[B]` int32, what each row is called.
    """

    key: Array
    rows: Array

    def _keys(self, positions: Array, purpose: int) -> Array:
        rows = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(self.key, purpose), row))(self.rows)
        return jax.vmap(lambda key, places: jax.vmap(lambda place: jax.random.fold_in(key, place))(places))(rows, positions)

    def uniform(self, positions: Array) -> Array:
        """`[B, n] -> [B, n]`, from [0, 1)."""
        return jax.vmap(jax.vmap(jax.random.uniform))(self._keys(positions, _ACCEPT))

    def draw(self, probabilities: Array, positions: Array, *, draft: bool = False) -> Array:
        """Tokens `[B, n]` from `probabilities [B, n, V]`, which need not sum to 1, by the Gumbel maximum."""
        keys = self._keys(positions, _DRAFT if draft else _TOKEN)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, probabilities.shape[-1:])))(keys)
        return likeliest(jnp.log(probabilities) + noise)


def likeliest(logits: Array) -> Array:
    """`[..., V] -> [...]` int32: the token with the largest logit, the first of those that tie.

    Two plain reductions: XLA's `argmax` takes 7 times as long on a CPU, which is as much as a small model's pass.
    """
    top, last = logits.max(axis=-1, keepdims=True), logits.shape[-1] - 1
    return jnp.where(logits == top, jnp.arange(last + 1, dtype=jnp.int32), last).min(axis=-1)


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """What is sampled from, `[..., V]` float32: softmax of `logits / temperature`, then top-k, then top-p of what is left.

    Tokens as likely as the last one kept are kept too.
    """
    logits = logits.astype(jnp.float32)
    # The largest comes off before the division, which would make infinities of all where the temperature is tiny.
    p = jax.nn.softmax((logits - logits.max(axis=-1, keepdims=True)) / _normal(sampling.temperature), axis=-1)
    if sampling.top_k is not None:
        p = _keep(p, lambda kept: jnp.sum(kept > 0, axis=-1) >= sampling.top_k)
    if sampling.top_p is not None:
        mass = _normal(sampling.top_p * p.sum(axis=-1))
        p = _keep(p, lambda kept: kept.sum(axis=-1) >= mass)
    return p / p.sum(axis=-1, keepdims=True)


def choose(
    logits: Array,
    drafts: Array,
    draft_probabilities: Array | None,
    positions: Array,
    sampling: Sampling | None,
    randomness: Randomness,
) -> tuple[Array, Array]:
    """Keeps a first part of the drafts and one token more, distributed as without drafts (arXiv 2211.17192, algorithm 1).

    Draft j is kept with probability min(1, p_j / q_j) of its token, and the token after those kept comes from
    max(p - q, 0), normalised: together p. Greedily, a draft is kept where it is the likeliest token.

    Args:
      logits: `[B, C, V]`, the model's at the token before each position.
      drafts: `[B, C - 1]`, for the first of these positions.
      draft_probabilities: `[B, C - 1, V]`, what each draft was drawn from; None where greedy or without drafts.
      positions: `[B, C]`.
      sampling: None for greedy.
      randomness: of these rows.

    Returns:
      tokens `[B, C]`, of which the first `kept + 1` count; kept `[B]`, how many drafts.
    """
    if sampling is None:
        tokens = likeliest(logits)
        return tokens, _leading(tokens[:, :-1] == drafts)
    p = probabilities(logits, sampling)
    if draft_probabilities is None:
        return randomness.draw(p[:, :1], positions[:, :1]), jnp.zeros(len(p), jnp.int32)
    p_draft, q_draft = (_of_tokens(x, drafts) for x in (p[:, :-1], draft_probabilities))
    kept = _leading(randomness.uniform(positions[:, :-1]) * q_draft < p_draft)
    q = jnp.pad(draft_probabilities, ((0, 0), (0, 1), (0, 0)))
    p_last, q_last, place = (_at(x, kept) for x in (p, q, positions))
    rest = jnp.maximum(p_last - q_last, 0)
    # Where p equals q nothing is rejected but by rounding.
    rest = jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p_last)
    last = randomness.draw(rest, place)
    tokens = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(tokens.shape[1]) == kept[:, None], last, tokens), kept


def _normal(x: Scalar) -> Array:
    """At least float32's smallest normal number: devices take what is smaller for 0."""
    return jnp.maximum(x, jnp.finfo(jnp.float32).tiny)


def _keep(p: Array, enough: Callable[[Array], Array]) -> Array:
    """The fewest of the largest entries of `p [..., V]`, in [0, 1], of which `enough` holds; others 0.

    The smallest entry kept is found bit by bit: the bits of floats from 0 up are ordered as they are.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def next_bit(i: Array, threshold: Array) -> Array:
        higher = threshold | (1 << (29 - i))
        return jnp.where(enough(jnp.where(bits >= higher[..., None], p, 0)), higher, threshold)

    threshold = jax.lax.fori_loop(0, 30, next_bit, jnp.zeros(p.shape[:-1], jnp.int32))
    return jnp.where(bits >= threshold[..., None], p, 0)


def _leading(agree: Array) -> Array:
    """`[B, n]` bool `-> [B]`: how many are true before the first that is not."""
    return jnp.cumprod(agree.astype(jnp.int32), axis=1).sum(axis=1)


def _at(array: Array, index: Array) -> Array:
    return array[jnp.arange(len(array))[:, None], index[:, None]]


def _of_tokens(x: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]
