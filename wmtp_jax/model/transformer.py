"""The model: a decoder trunk, H prediction heads and, where asked for, a value head. Shapes as in `layers.py`.

`head_groups` is the one place that knows how the heads differ: everything that needs logits goes through it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wmtp_jax.model.layers import (
    Array,
    Context,
    Layer,
    Norm,
    Projection,
    attention_mask,
    rotary_tables,
    stack,
)
from wmtp_jax.parallel.sharding import constrain, lookup
from wmtp_jax.settings import ModelSettings


class SequentialHead(nnx.Module):
    """One depth of DeepSeek-V3's MTP (arXiv 2412.19437, eq. 21-23), in the form that published weights have.

    `h_k = output_norm(layer(project([embedding_norm(e(x[s+k])); hidden_norm(h_{k-1})])))`; h_0 is the trunk's
    normed output, and h_k is both what the unembedding reads and what the next depth takes.
    """

    def __init__(self, settings: ModelSettings, *, rngs: nnx.Rngs):
        s = settings
        self.embedding_norm = Norm(s.width, s)
        self.hidden_norm = Norm(s.width, s)
        self.project = Projection(2 * s.width, s.width, bias=False, scale=s.initial_scale, rngs=rngs)
        self.layer = Layer(s, rngs=rngs)
        self.output_norm = Norm(s.width, s)

    def join(self, previous: Array, embedded: Array) -> Array:
        """What the layer reads: the projection of both, `[..., D]`."""
        return self.project(jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(previous)], axis=-1))

    def __call__(self, previous: Array, embedded: Array, context: Context) -> Array:
        return self.output_norm(self.layer(self.join(previous, embedded), context))


class ValueHead(nnx.Module):
    """`[B, S, D] -> [B, S]` float32: D -> D/2 -> 1 with a GELU between, on states of root mean square 1.

    The states of published models are large (28 to 400 in the 135M Llama, with single entries in the thousands), and a head that
    reads them as they are learns less from them (experiments/critic).
    """

    def __init__(self, settings: ModelSettings, *, rngs: nnx.Rngs):
        width = settings.width
        self.epsilon = settings.norm_epsilon
        self.inner = Projection(width, width // 2, bias=True, scale=width**-0.5, rngs=rngs)
        self.outer = Projection(width // 2, 1, bias=True, scale=0.0, rngs=rngs)

    def __call__(self, hidden: Array) -> Array:
        wide = hidden.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return self.outer(jax.nn.gelu(self.inner(wide), approximate=True))[..., 0]


class Model(nnx.Module):
    """Decoder with H heads.

    Parameters, by path: `embedding [V, D]`, `position_embedding [P, D]` (learned), `layers.*` stacked over the trunk's
    layers, `final_norm.*`, `unembedding [D, V]` (absent where tied), and by head kind
      linear: `heads [H-1, D, V]`, the unembeddings of heads 1.. (head 0 has the trunk's);
      block: `heads.*` layers stacked over H, head 0 being the trunk's last layer, so `layers.*` has one fewer;
      sequential: `heads.*` stacked over the H-1 depths after the first.
    """

    def __init__(self, settings: ModelSettings, *, rngs: nnx.Rngs, value_head: bool = False):
        s = settings
        self.settings = s
        plain = dataclasses.replace(s, lora_rank=0)  # adapters are the trunk's

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(s.initial_scale * jax.random.normal(rngs.params(), shape, jnp.float32))

        self.embedding = normal(s.vocabulary_size, s.width)
        if s.positions == "learned":
            self.position_embedding = normal(s.max_positions, s.width)
        trunk_layers = s.layers - (s.head_kind == "block")
        self.layers = stack(lambda rngs: Layer(s, rngs=rngs), trunk_layers, rngs=rngs)
        self.final_norm = Norm(s.width, s)
        if not s.tie_embeddings:
            self.unembedding = normal(s.width, s.vocabulary_size)
        match s.head_kind:
            case "linear":
                self.heads = normal(s.num_heads - 1, s.width, s.vocabulary_size) if s.num_heads > 1 else None
            case "block":
                self.heads = stack(lambda rngs: Layer(plain, rngs=rngs), s.num_heads, rngs=rngs)
            case "sequential":
                self.heads = stack(lambda rngs: SequentialHead(plain, rngs=rngs), s.num_heads - 1, rngs=rngs)
        self.value_head = ValueHead(s, rngs=rngs) if value_head else None

    # ---- the trunk -------------------------------------------------------------------------------------------------

    def embed(self, tokens: Array) -> Array:
        """Token embeddings `[..., D]` in the compute type."""
        return lookup(self.embedding[...], tokens, self.settings.compute_dtype)

    def context(self, segment_ids: Array, positions: Array) -> Context:
        """What the layers of this batch share; `segment_ids`, `positions` `[B, S]`."""
        rotary = rotary_tables(positions, self.settings) if self.settings.positions == "rope" else None
        return Context(rotary, attention_mask(segment_ids))

    def trunk(self, tokens: Array, positions: Array, context: Context) -> Array:
        """The hidden states that the heads share, `[B, S, D]`: after the last layer and the final norm for `linear` and
        `sequential` heads, before the last layer for `block` heads."""
        s = self.settings
        x = self.embed(tokens)
        if s.positions == "learned":
            x = constrain(x + self.position_embedding[...][positions].astype(x.dtype), "states")
        if self.layers is not None:
            definition, parameters = nnx.split(self.layers)

            def one_layer(x: Array, parameters: Any) -> tuple[Array, None]:
                return nnx.merge(definition, parameters)(x, context), None

            x, _ = jax.lax.scan(_remat(one_layer, s.remat), x, parameters)
        return x if s.head_kind == "block" else self.final_norm(x)

    def unembed(self) -> Array:
        """The trunk's unembedding, `[D, V]`."""
        return self.embedding[...].T if self.settings.tie_embeddings else self.unembedding[...]

    # ---- the heads -------------------------------------------------------------------------------------------------

    def head_groups(
        self, shared: Array, tokens: Array, context: Context, *, num_heads: int | None = None
    ) -> list[tuple[Array, Array]]:
        """What the heads' logits are made of, as few products as can be: (final hidden states, unembedding) of each group.

        A group is either h heads that share their states, `[B, S, D]` with `[h, D, V]`, or h heads that share their
        unembedding, `[B, S, h, D]` with `[D, V]`. The groups' heads, one group after the other, are heads 0, 1, ...

        The layers of `block` and `sequential` heads run one after the other (`lax.scan`), each under `jax.checkpoint`, so
        that no more than one head's layer is held, forward or backward. Their states, `h B S D`, are kept: the loss then
        makes one gradient of the unembedding, `D V`, and not one for every head on top of their sum.

        Args:
          shared: the trunk's output, `[B, S, D]`.
          tokens: `[B, S]`; depth k of `sequential` heads reads x[s+k], token 0's embedding past the row's end.
          context: of the same batch as `shared`.
          num_heads: only the first so many heads; all by default.

        Raises:
          ValueError: more heads than there are, or none.
        """
        count = num_heads or self.settings.num_heads
        if not 1 <= count <= self.settings.num_heads:
            raise ValueError(f"num_heads {count}: the model has {self.settings.num_heads}")
        unembedding = self.unembed()
        match self.settings.head_kind:
            case "linear":
                groups = [(shared, unembedding[None])]
                return groups + [(shared, self.heads[...][: count - 1])] if count > 1 else groups  # pyrefly: ignore[unsupported-operation]
            case "block":
                states = self._block_states(shared, context, count)
            case _:
                states = self._sequential_states(shared, tokens, context, count)
        return [(jnp.moveaxis(states, 0, 2), unembedding)]

    def _block_states(self, shared: Array, context: Context, count: int) -> Array:
        definition, parameters = nnx.split(self.heads)

        @jax.checkpoint
        def block(_: None, parameters: Any) -> tuple[None, Array]:
            return None, self.final_norm(nnx.merge(definition, parameters)(shared, context))  # pyrefly: ignore[not-callable]

        return jax.lax.scan(block, None, jax.tree.map(lambda leaf: leaf[:count], parameters))[1]

    def _sequential_states(self, shared: Array, tokens: Array, context: Context, count: int) -> Array:
        if count == 1:
            return shared[None]
        definition, parameters = nnx.split(self.heads)

        @jax.checkpoint
        def depth(previous: Array, scanned: Any) -> tuple[Array, Array]:
            parameters, tokens = scanned
            hidden = nnx.merge(definition, parameters)(previous, self.embed(tokens), context)  # pyrefly: ignore[not-callable]
            return hidden, hidden

        ahead = jnp.stack([_ahead(tokens, k) for k in range(1, count)])
        parameters = jax.tree.map(lambda leaf: leaf[: count - 1], parameters)
        return jnp.concatenate([shared[None], jax.lax.scan(depth, shared, (parameters, ahead))[1]])

    def logits(
        self, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None
    ) -> Array:
        """Every head's logits `[B, S, H, V]` in float32, for checks and small inputs: training never makes them.

        `tokens [B, S]` int; without `segment_ids` every row is one segment and every token is real. Compiled once a shape.
        In float32, products are summed in float64 (CPU and CUDA), so that no other order of summation comes nearer to them.
        """
        tokens = jnp.asarray(tokens)
        if segment_ids is None:
            if self.settings.positions == "learned" and tokens.shape[-1] > self.settings.max_positions:
                raise ValueError(f"{tokens.shape[-1]} tokens: the model has {self.settings.max_positions} learned positions")
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = segment_positions(segment_ids)
        with jax.default_matmul_precision(_exact_products(self.settings)):
            return _logits(*nnx.split(self), tokens, segment_ids, positions)


def _exact_products(settings: ModelSettings) -> str | None:
    """The precision under which float32 products are their exact sums, rounded once; None, as always, where a device has none."""
    known = settings.compute_dtype == "float32" and jax.default_backend() in ("cpu", "gpu")
    return "F64_F64_F64" if known else None


@functools.partial(jax.jit, static_argnums=0)
def _logits(definition: nnx.GraphDef, state: nnx.State, tokens: Array, segment_ids: Array, positions: Array) -> Array:
    model = nnx.merge(definition, state)
    context = model.context(segment_ids, positions)
    shared = model.trunk(tokens, positions, context)

    def product(states: Array, unembedding: Array) -> Array:
        subscripts = "bsd,hdv->bshv" if unembedding.ndim == 3 else "bshd,dv->bshv"
        narrow = unembedding.astype(states.dtype)
        return jnp.einsum(subscripts, states, narrow, preferred_element_type=jnp.float32)

    return jnp.concatenate([product(*group) for group in model.head_groups(shared, tokens, context)], axis=2)


def segment_positions(segment_ids: Array) -> Array:
    """`[..., S] -> [..., S]`: the place of every token in its segment, from 0 (padding counts as a segment)."""
    length = segment_ids.shape[-1]
    index = jnp.broadcast_to(jnp.arange(length), segment_ids.shape)
    previous = jnp.concatenate([segment_ids[..., :1] - 1, segment_ids[..., :-1]], axis=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(starts, axis=segment_ids.ndim - 1)


def _ahead(tokens: Array, k: int) -> Array:
    """`[B, S] -> [B, S]`, the tokens k later; 0 past the end, which a short row may reach at once."""
    return jnp.pad(tokens, ((0, 0), (0, k)))[:, k:]


def _remat(function: Callable, kind: str) -> Callable:
    match kind:
        case "none":
            return function
        case "layer":
            return jax.checkpoint(function)
        case _:  # dots; `ModelSettings` has refused all others
            return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
