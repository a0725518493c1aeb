"""Decoding on the device: rows that each go on by one token a forward pass, or by several where heads draft them.

A pass reads the last known token and the drafts after it, H tokens in one go, keeps the drafts that the model agrees with and
one token more, and lets the heads draft anew. Without heads to draft, a pass reads one token and adds one.

Axes: B rows, T slots, H heads, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wmtp_jax.inference.cached_model import Array, Caches, Unrolled, draft, empty_caches, fill, put_row, read, unembed
from wmtp_jax.inference.sampling import Randomness, Sampling, Scalar, choose, likeliest, probabilities


class State(NamedTuple):
    """B rows in the middle of decoding.

    Attributes:
      tokens: `[B, T]`; after the known ones, the drafts.
      length: `[B]`, how many are known; all but the last are in the caches.
      limit: `[B]`, the length at which a row ends.
      active: `[B]` bool, whether it goes on.
      name: `[B]`, what its random numbers go by.
      passes: `[B]`, forward passes so far.
      kept: `[H]`, of the passes with drafts, how many kept 0, 1, ... of them, over all rows.
      caches: of the model.
      draft_probabilities: `[B, H - 1, V]`; None where drafts are not sampled.
    """

    tokens: Array
    length: Array
    limit: Array
    active: Array
    name: Array
    passes: Array
    kept: Array
    caches: Caches
    draft_probabilities: Array | None


@functools.partial(jax.jit, static_argnames=("rows", "slots", "sampled"))
def empty_state(weights: Unrolled, *, rows: int, slots: int, sampled: bool) -> State:
    """Rows without a prompt, none of them active; `sampled` says whether drafts will be."""
    drafts = weights.drafts
    q = jnp.zeros((rows, drafts, weights.settings.vocabulary_size), jnp.float32) if drafts and sampled else None
    zeros = jnp.zeros(rows, jnp.int32)
    return State(
        tokens=jnp.zeros((rows, slots), jnp.int32),
        length=zeros + 1,
        limit=zeros,
        active=zeros > 0,
        name=zeros,
        passes=zeros,
        kept=jnp.zeros(drafts + 1, jnp.int32),
        caches=empty_caches(weights, rows=rows, slots=slots),
        draft_probabilities=q,
    )


@functools.partial(jax.jit, static_argnames="width")
def prefill(weights: Unrolled, tokens: Array, count: Array, *, width: int) -> Caches:
    """Reads the first `count` chunks of a prompt, `tokens [1, T]`, `width` tokens each.

    What a chunk holds past the prompt's end does no harm: it is overwritten before it is seen.
    """

    def chunk(i: Array, caches: Caches) -> Caches:
        start = jnp.full(1, i * width, jnp.int32)
        part = jax.lax.dynamic_slice_in_dim(tokens, i * width, width, axis=1)
        _, shared, caches = read(weights, caches, part, start)
        return fill(weights, caches, tokens, shared, start)

    return jax.lax.fori_loop(0, count, chunk, empty_caches(weights, rows=1, slots=tokens.shape[1]))


@functools.partial(jax.jit, donate_argnames="state")
def insert(
    state: State, caches: Caches, tokens: Array, *, row: Scalar, length: Scalar, limit: Scalar, name: Scalar
) -> State:
    """Puts a prompt, `tokens [1, T]` and its caches, in place of row `row`."""

    def put(old: Array, new: Any) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, row, axis=0)

    def scalar(value: Any, like: Array) -> Array:
        return put(like, jnp.asarray(value, like.dtype)[None])

    q = state.draft_probabilities
    return state._replace(
        tokens=put(state.tokens, tokens),
        length=scalar(length, state.length),
        limit=scalar(limit, state.limit),
        active=scalar(True, state.active),
        name=scalar(name, state.name),
        passes=scalar(0, state.passes),
        caches=put_row(state.caches, caches, row),
        # No head has drafted yet: what lies after the prompt counts as drafts of token 0, and is judged as such.
        draft_probabilities=q if q is None else put(q, jnp.zeros_like(q[:1]).at[:, :, 0].set(1)),
    )


@functools.partial(jax.jit, donate_argnames="state")
def decode(
    weights: Unrolled,
    state: State,
    sampling: Sampling | None,
    key: Array,
    stop_tokens: Array,
    *,
    passes: Scalar,
    floor: Scalar,
) -> State:
    """Forward passes until at most `floor` rows are active, `passes` of them at most.

    Args:
      weights: with heads to draft, or without.
      state: taken over.
      sampling: None for greedy.
      key: of the seed.
      stop_tokens: `[n]`, tokens that end a row; they are kept as its last.
      passes: at most so many.
      floor: how few rows may be left active.
    """

    def go_on(carry: tuple[Array, State]) -> Array:
        done, state = carry
        return (done < passes) & (state.active.sum() > floor)

    def one_pass(carry: tuple[Array, State]) -> tuple[Array, State]:
        done, state = carry
        return done + 1, _one_pass(weights, state, sampling, key, stop_tokens)

    return jax.lax.while_loop(go_on, one_pass, (jnp.int32(0), state))[1]


def _one_pass(weights: Unrolled, state: State, sampling: Sampling | None, key: Array, stop_tokens: Array) -> State:
    width = weights.drafts + 1
    rows, start = jnp.arange(len(state.tokens))[:, None], state.length - 1
    places = start[:, None] + jnp.arange(width)
    randomness = Randomness(key, state.name)

    given = state.tokens[rows, places]
    final, shared, caches = read(weights, state.caches, given, start)
    logits = unembed(weights, final)
    chosen, kept = choose(logits, given[:, 1:], state.draft_probabilities, places + 1, sampling, randomness)

    count = jnp.minimum(kept + 1, state.limit - state.length)
    stops = (chosen[..., None] == stop_tokens).any(axis=-1) & (jnp.arange(width) < count[:, None])
    stopped = stops.any(axis=1)
    count = jnp.where(stopped, jnp.argmax(stops, axis=1) + 1, count)
    length = state.length + jnp.where(state.active, count, 0)
    tokens = state.tokens.at[rows, places + 1].set(chosen)

    q = state.draft_probabilities
    if weights.drafts:
        drawn = []

        def pick(logits: Array, k: int) -> Array:
            if sampling is None:
                return likeliest(logits)
            drawn.append(probabilities(logits, sampling))
            at = length[:, None] - 1 + k + jnp.arange(logits.shape[1])
            return randomness.draw(drawn[-1], at, draft=True)

        tokens, caches = draft(weights, caches, tokens, length, shared, start, pick)
        q = jnp.concatenate(drawn, axis=1) if drawn else None

    judged = state.active & (state.passes > 0)
    return state._replace(
        tokens=tokens,
        length=length,
        active=state.active & ~stopped & (length < state.limit),
        passes=state.passes + state.active,
        kept=state.kept + (judged[:, None] & (kept[:, None] == jnp.arange(width))).sum(axis=0),
        caches=caches,
        draft_probabilities=q,
    )
