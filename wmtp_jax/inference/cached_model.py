"""A model laid out for decoding: layers one by one, and the keys and values of the positions read so far.

Slot t of a row's cache holds position t. Reading tokens writes their slots, and a position sees the slots up to its own, so
that what lies beyond (a prompt's padding, drafts that were rejected) is overwritten before anything sees it.

T slots, and C tokens read at once, in row b at positions `start[b]` and on; a slot past the end is not written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wmtp_jax.model.layers import Array, Layer, Norm, rotary_tables
from wmtp_jax.model.transformer import Model, SequentialHead
from wmtp_jax.settings import ModelSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unrolled:
    """A model's weights for decoding, matrices in the compute type.

    Attributes:
      settings: of the model.
      embedding: `[V, D]`.
      position_embedding: `[P, D]`, or None for rotary positions.
      layers: every layer up to head 0's states; the last is head 0's own for `block` heads.
      final_norm: of the trunk.
      unembedding: `[D, V]`, or None where tied.
      heads: what heads 1, 2, ... add: an unembedding `[D, V]`, a layer, or a depth each. Empty where nothing drafts.
    """

    settings: ModelSettings = dataclasses.field(metadata={"static": True})
    embedding: Array
    position_embedding: Array | None
    layers: tuple[Layer, ...]
    final_norm: Norm
    unembedding: Array | None
    heads: tuple[Array, ...] | tuple[Layer, ...] | tuple[SequentialHead, ...]

    @property
    def drafts(self) -> int:
        """Tokens drafted a pass."""
        return len(self.heads)


class Cache(NamedTuple):
    """Keys `[B K, C, T]` and values `[B K, T, C]` of one layer, C being a head's size.

    They are held as the products of attention read them: XLA on a CPU would copy a cache for every token to transpose it,
    and four times to join its first two axes.
    """

    key: Array
    value: Array


class Caches(NamedTuple):
    """What is kept of the positions read so far.

    Attributes:
      layers: one of each layer.
      heads: one of each drafting head that has a layer.
      hidden: the trunk's states `[B, T, D]`, which `sequential` heads read again; None for others.
    """

    layers: tuple[Cache, ...]
    heads: tuple[Cache, ...]
    hidden: Array | None


def unroll(model: Model, *, drafting: bool) -> Unrolled:
    """Copies the stacked layers apart: a loop over a stack would copy each layer's weights for every token.

    Args:
      model: float32 parameters, or what they were loaded as.
      drafting: with the heads after the first.
    """
    s = model.settings
    layers = _pieces(model.layers, s.compute_dtype)
    heads: tuple[Any, ...] = ()
    if s.head_kind == "block":
        first, *rest = _pieces(model.heads, s.compute_dtype)
        layers, heads = (*layers, first), tuple(rest)
    elif drafting:
        heads = _pieces(model.heads, s.compute_dtype)

    def narrow(parameter: nnx.Param) -> Array:
        return parameter[...].astype(s.compute_dtype)

    return Unrolled(
        settings=s,
        embedding=narrow(model.embedding),
        position_embedding=narrow(model.position_embedding) if s.positions == "learned" else None,
        layers=layers,
        final_norm=model.final_norm,
        unembedding=None if s.tie_embeddings else narrow(model.unembedding),
        heads=heads if drafting else (),
    )


def empty_caches(weights: Unrolled, *, rows: int, slots: int) -> Caches:
    """Caches that hold nothing yet."""
    s = weights.settings

    def cache() -> Cache:
        groups, zeros = rows * s.kv_heads, functools.partial(jnp.zeros, dtype=s.compute_dtype)
        return Cache(key=zeros((groups, s.head_dim, slots)), value=zeros((groups, slots, s.head_dim)))

    layered = weights.heads if s.head_kind != "linear" else ()
    hidden = jnp.zeros((rows, slots, s.width), s.compute_dtype) if layered and s.head_kind == "sequential" else None
    return Caches(tuple(cache() for _ in weights.layers), tuple(cache() for _ in layered), hidden)


def put_row(caches: Caches, row: Caches, index: Array | int) -> Caches:
    """Puts the caches of one row in place of row `index`."""

    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, index * len(new), axis=0)

    return jax.tree.map(put, caches, row)


def read(weights: Unrolled, caches: Caches, tokens: Array, start: Array) -> tuple[Array, Array, Caches]:
    """Reads `tokens [B, C]` at positions `start [B]` and on.

    Returns:
      head 0's final states `[B, C, D]`; the states that all heads share, `[B, C, D]`; the caches of the layers renewed.
    """
    at = _Places.of(weights.settings, start, tokens.shape[1])
    x = _embed(weights, tokens)
    if weights.position_embedding is not None:
        # Drafts and padding may lie past the last learned position; nothing that counts does.
        x = x + weights.position_embedding[jnp.minimum(at.positions, len(weights.position_embedding) - 1)]
    renewed = []
    for layer, cache in zip(weights.layers, caches.layers, strict=True):
        shared = x
        x, cache = _layer(layer, x, at, cache)
        renewed.append(cache)
    final = weights.final_norm(x)
    return final, shared if weights.settings.head_kind == "block" else final, caches._replace(layers=tuple(renewed))


def unembed(weights: Unrolled, states: Array) -> Array:
    """`[..., D] -> [..., V]`, logits in float32."""
    return _product(states, weights.embedding.T if weights.unembedding is None else weights.unembedding)


def fill(weights: Unrolled, caches: Caches, tokens: Array, shared: Array, start: Array) -> Caches:
    """The heads' part of reading a prompt: their caches at the positions that `shared [B, C, D]` is of.

    Args:
      weights: what decodes.
      caches: as `read` left them.
      tokens: `[B, T]`, known as far as the prompt goes.
      shared: from `read`.
      start: `[B]`, the first position of `shared`.
    """
    match weights.settings.head_kind if weights.drafts else "none":
        case "block":
            at = _Places.of(weights.settings, start, shared.shape[1])
            pairs = zip(weights.heads, caches.heads, strict=True)
            return caches._replace(heads=tuple(_layer(layer, shared, at, cache)[1] for layer, cache in pairs))
        case "sequential":
            caches = caches._replace(hidden=_write(caches.hidden, shared, start))
            return _depths(
                weights, caches, tokens, shared, start, jnp.zeros_like(start), lambda k, states, tokens: tokens
            )[1]
    return caches


def draft(
    weights: Unrolled,
    caches: Caches,
    tokens: Array,
    length: Array,
    shared: Array,
    start: Array,
    pick: Callable[[Array, int], Array],
) -> tuple[Array, Caches]:
    """Writes what heads 1.. say after the last position read into `tokens`, positions `length` to `length + H - 2`.

    Position `length - 1` has a token that is not read yet, so that the last position read is `length - 2`, where head k
    speaks of position `length - 1 + k`. `sequential` heads go over the last 2 (H - 1) positions again: those of the pass
    before, whose tokens were drafts, and those read since.

    Args:
      weights: what decodes.
      caches: as `read` left them.
      tokens: `[B, T]`.
      length: `[B]`, how many of them are known, at least 2.
      shared: from `read`, `[B, C, D]`.
      start: `[B]`, the first position of `shared`.
      pick: (logits `[B, n, V]` of heads k, k + 1, ..., k) -> a token for each, `[B, n]`.
    """
    last = jnp.clip(length - 2 - start, 0, shared.shape[1] - 1)
    match weights.settings.head_kind:
        case "linear":
            state = _at(shared, last)[:, 0]
            drafts = pick(jnp.stack([_product(state, head) for head in weights.heads], axis=1), 1)
            return _write(tokens, drafts, length), caches
        case "block":
            at = _Places.of(weights.settings, start, shared.shape[1])
            pairs = zip(weights.heads, caches.heads, strict=True)
            states, renewed = zip(*(_layer(layer, shared, at, cache, only=last) for layer, cache in pairs), strict=True)
            drafts = pick(unembed(weights, weights.final_norm(jnp.concatenate(states, axis=1))), 1)
            return _write(tokens, drafts, length), caches._replace(heads=renewed)
    caches = caches._replace(hidden=_write(caches.hidden, shared, start))
    width = 2 * weights.drafts
    start = jnp.clip(length - 1 - width, 0)

    def next_draft(k: int, states: Array, tokens: Array) -> Array:
        return _write(tokens, pick(unembed(weights, states), k), length - 1 + k)

    hidden = _slice(caches.hidden, start, width)
    return _depths(weights, caches, tokens, hidden, start, length - 2 - start, next_draft)


# ---- pieces of the above ---------------------------------------------------------------------------------------------


class _Places(NamedTuple):
    """Where the tokens that are read lie: positions `[B, C]` and their rotary tables."""

    positions: Array
    rotary: tuple[Array, Array] | None

    @classmethod
    def of(cls, settings: ModelSettings, start: Array, count: int) -> _Places:
        positions = _range(start, count)
        return cls(positions, rotary_tables(positions, settings) if settings.positions == "rope" else None)


def _layer(layer: Layer, x: Array, at: _Places, cache: Cache, *, only: Array | None = None) -> tuple[Array, Cache]:
    """A layer's states at `x [B, C, D]`, or at one index `only [B]` of C, `[B, 1, D]`; every index goes into the cache."""
    query, key, value = layer.attention.project(layer.attention_norm(x), at.rotary)
    start, positions = at.positions[:, 0], at.positions
    cache = Cache(_write_keys(cache.key, key, start), _write_values(cache.value, value, start))
    if only is not None:
        x, query, positions = (_at(array, only) for array in (x, query, positions))
    x = x + layer.attention.output(_attend(query, cache, positions).reshape(*x.shape[:2], -1))
    return x + layer.mlp(layer.mlp_norm(x)), cache


def _attend(query: Array, cache: Cache, positions: Array) -> Array:
    """`layers.attend` over cached keys and values: `[B, C, N, size] -> [B, C, N, size]`."""
    rows, count, heads, size = query.shape
    groups = cache.key.shape[0] // rows
    query = (query * size**-0.5).reshape(rows, count, groups, -1, size).transpose(0, 2, 3, 1, 4)
    scores = jnp.matmul(query.reshape(rows * groups, -1, size), cache.key, preferred_element_type=jnp.float32)
    seen = (jnp.arange(scores.shape[-1]) <= positions[:, :, None])[:, None, None]
    scores = jnp.where(seen, scores.reshape(rows, groups, -1, count, scores.shape[-1]), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(cache.value.dtype)
    mixed = jnp.matmul(weights.reshape(rows * groups, -1, weights.shape[-1]), cache.value)
    return mixed.reshape(rows, groups, -1, count, size).transpose(0, 3, 1, 2, 4).reshape(rows, count, heads, size)


def _depths(
    weights: Unrolled,
    caches: Caches,
    tokens: Array,
    states: Array,
    start: Array,
    only: Array,
    after: Callable[[int, Array, Array], Array],
) -> tuple[Array, Caches]:
    """The depths of `sequential` heads over `states [B, C, D]`.

    `after(k, states, tokens)` may add tokens for the next; it gets depth k's states at one index `only [B]` of C, `[B, 1, D]`.
    """
    at = _Places.of(weights.settings, start, states.shape[1])
    renewed = []
    for k, (head, cache) in enumerate(zip(weights.heads, caches.heads, strict=True), start=1):
        ahead = _slice(tokens, start + k, states.shape[1])
        last = k == weights.drafts
        joined = head.join(states, _embed(weights, ahead))
        states, cache = _layer(head.layer, joined, at, cache, only=only if last else None)
        states = head.output_norm(states)
        tokens = after(k, states if last else _at(states, only), tokens)
        renewed.append(cache)
    return tokens, caches._replace(heads=tuple(renewed))


def _embed(weights: Unrolled, tokens: Array) -> Array:
    if tokens.size <= 8:
        rows = [jax.lax.dynamic_slice_in_dim(weights.embedding, token, 1) for token in tokens.reshape(-1)]
        return jnp.concatenate(rows).reshape(*tokens.shape, -1)
    return weights.embedding[tokens]


def _product(states: Array, unembedding: Array) -> Array:
    return jnp.matmul(states, unembedding, preferred_element_type=jnp.float32)


def _range(start: Array, count: int) -> Array:
    return start[:, None] + jnp.arange(count)


def _rows(array: Array) -> Array:
    return jnp.arange(array.shape[0])[:, None]


def _at(array: Array, index: Array) -> Array:
    """`[B, C, ...], [B] -> [B, 1, ...]`."""
    if len(array) == 1:
        return jax.lax.dynamic_slice_in_dim(array, index[0], 1, axis=1)
    return array[_rows(array), index[:, None]]


def _slice(array: Array, start: Array, count: int) -> Array:
    """`[B, T, ...] -> [B, count, ...]` from `start [B]` on, the last slot again past the end."""
    if len(array) == 1:
        return jax.lax.dynamic_slice_in_dim(array, start[0], count, axis=1)
    return array[_rows(array), jnp.minimum(_range(start, count), array.shape[1] - 1)]


def _write(array: Array, new: Array, start: Array) -> Array:
    """Puts `new [B, C, ...]` into `array [B, T, ...]` from `start [B]` on."""
    if len(array) == 1:
        return jax.lax.dynamic_update_slice_in_dim(array, new, start[0], axis=1)
    return array.at[_rows(array), _range(start, new.shape[1])].set(new, mode="drop", unique_indices=True)


def _write_values(array: Array, new: Array, start: Array) -> Array:
    """Puts `new [B, C, K, size]` into `array [B K, T, size]` from `start [B]` on."""
    rows, count, groups, size = new.shape
    if rows == 1:
        return jax.lax.dynamic_update_slice_in_dim(array, new[0].swapaxes(0, 1), start[0], axis=1)
    apart = array.reshape(rows, groups, -1, size)
    apart = apart.at[_rows(apart), :, _range(start, count)].set(new, mode="drop", unique_indices=True)
    return apart.reshape(array.shape)


def _write_keys(array: Array, new: Array, start: Array) -> Array:
    """Puts `new [B, C, K, size]` into `array [B K, size, T]` from `start [B]` on."""
    rows, count, groups, size = new.shape
    if rows == 1:
        return jax.lax.dynamic_update_slice_in_dim(array, new[0].transpose(1, 2, 0), start[0], axis=2)
    apart = array.reshape(rows, groups, size, -1)
    apart = apart.at[_rows(apart), :, :, _range(start, count)].set(new, mode="drop", unique_indices=True)
    return apart.reshape(array.shape)


def _pieces(stacked: Any, dtype: str) -> tuple[Any, ...]:
    """A stack of arrays or of modules, one by one; matrices in the compute type, norms as they are."""
    if stacked is None:
        return ()
    if isinstance(stacked, nnx.Param):
        return _unstack(stacked[...], dtype=dtype)
    definition, state = nnx.split(stacked)
    return tuple(nnx.merge(definition, piece) for piece in _unstack(state, dtype=dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def _unstack(tree: Any, *, dtype: str) -> tuple[Any, ...]:
    def one(leaf: Array, i: int) -> Array:
        return leaf[i].astype(dtype) if leaf.ndim > 2 else leaf[i]

    count = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(functools.partial(one, i=i), tree) for i in range(count))
