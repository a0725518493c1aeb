"""The parts of a decoder layer.

Shapes: B rows, S positions, D width, N query heads, K key/value heads, C head size, F mlp width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from wmtp_jax.parallel.sharding import constrain, current_mesh
from wmtp_jax.settings import ModelSettings, rotary_frequencies

Array = jax.Array

# Queries whose scores are held at once where rows are long. Rows shorter than four blocks are not cut.
_QUERY_BLOCK = 256


class Context:
    """What every layer of one forward pass shares: rotary tables and the attention mask.

    Attributes:
      rotary: (cos, sin) `[B, S, C]` float32, or None for learned positions.
      mask: `[B, 1, S, S]` bool, query position s may read key position t.
    """

    def __init__(self, rotary: tuple[Array, Array] | None, mask: Array):
        self.rotary = rotary
        self.mask = mask


jax.tree_util.register_pytree_node(Context, lambda c: ((c.rotary, c.mask), None), lambda _, parts: Context(*parts))


def rotary_tables(positions: Array, settings: ModelSettings) -> tuple[Array, Array]:
    """Cosines and sines of the rotary embedding (arXiv 2104.09864), `[B, S, C]`, both halves of C alike."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(settings)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * settings.rope_attention_factor, jnp.sin(angles) * settings.rope_attention_factor


def rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    """Applies the tables to `x [B, S, heads, C]`; pairs are (i, i + C/2), as in the published Llama weights."""
    cos, sin = (table[:, :, None, :].astype(x.dtype) for table in rotary)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def attention_mask(segment_ids: Array) -> Array:
    """`[B, S] -> [B, 1, S, S]`: causal, and within one segment. Padding (0) reads padding, so that no row is empty."""
    length = segment_ids.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))
    return constrain((causal & (segment_ids[:, :, None] == segment_ids[:, None, :]))[:, None], "attention_mask")


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Softmax attention, `[B, S, N, C]` x `[B, S, K, C]` x `[B, S, K, C]` -> `[B, S, N, C]`; softmax in float32.

    On CUDA, in bfloat16, cuDNN's flash attention. Elsewhere all scores of a short row at once, and those of a long one a block
    of queries at a time, so that neither forward nor backward holds `S x S` scores of every head.
    """
    length = query.shape[1]
    if _has_cudnn(query):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    if length < 4 * _QUERY_BLOCK or length % _QUERY_BLOCK:
        return _attend_all(query, key, value, mask)

    # Every n-th query is one block, so that what a device of a mesh holds of the positions is a part of every block.
    def blocks(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], _QUERY_BLOCK, -1, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def one_block(_: None, block: tuple[Array, Array]) -> tuple[None, Array]:
        queries, visible = block
        return None, _attend_all(queries, key, value, visible.swapaxes(1, 2))

    mixed = jax.lax.scan(one_block, None, (blocks(query), blocks(mask.swapaxes(1, 2))))[1]
    return jnp.moveaxis(mixed, 0, 2).reshape(query.shape)


def _has_cudnn(query: Array) -> bool:
    # It wants narrow types, and head sizes that are multiples of 8.
    narrow = query.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and narrow and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128


def _attend_all(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Written as matrix products over (row, head) with the positions last but one: on a CPU forward and backward take two
    thirds of the time of `jax.nn.dot_product_attention`, whose layout XLA does not hand to the matrix library."""
    rows, length, heads, size = query.shape
    groups = key.shape[2]
    query = query.reshape(rows, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4) * size**-0.5
    key, value = (x.transpose(0, 2, 1, 3)[:, :, None] for x in (key, value))
    scores = jnp.matmul(query, key.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -1e30), axis=-1).astype(value.dtype)
    mixed = jnp.matmul(weights, value)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, size)


class Norm(nnx.Module):
    """RMSNorm, or LayerNorm with a bias, over the last axis; computed in float32."""

    def __init__(self, size: int, settings: ModelSettings, *, kind: str | None = None):
        self.kind = kind or settings.norm
        self.epsilon = settings.norm_epsilon
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        if self.kind == "layernorm":
            self.bias = nnx.Param(jnp.zeros((size,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        if self.kind == "layernorm":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        wide = wide * self.scale[...]
        if self.kind == "layernorm":
            wide = wide + self.bias[...]
        return wide.astype(x.dtype)


def _flat(function: Callable[[Array], Array], x: Array) -> Array:
    """`function` of `[N, D]` for `x [B, S, D]`, on one device (a mesh splits rows and positions, and wants both axes).

    The gradient of a kernel then sums over one axis. Over two, XLA on a CPU first writes transposed copies of both factors, and
    works out again what was elementwise in them, in that order: forward and backward of the feed-forward part took 1.8 times as
    long at 8 x 256 x 256 (experiments/speed).
    """
    return function(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Projection(nnx.Module):
    """`y = x @ kernel (+ bias)`, kernel `[in, out]`; cast to the type of `x`.

    With an `adapter` (rank, factor), `y` also has `factor * (x @ lora_down) @ lora_up`, see `trainable.py`.
    """

    def __init__(
        self, size_in: int, size_out: int, *, bias: bool, scale: float, rngs: nnx.Rngs, adapter: tuple[int, float] = (0, 1.0)
    ):
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (size_in, size_out), jnp.float32))
        self.has_bias = bias
        if bias:
            self.bias = nnx.Param(jnp.zeros((size_out,), jnp.float32))
        self.rank, self.factor = adapter
        if self.rank:
            noise = jax.random.normal(rngs.params(), (size_in, self.rank), jnp.float32)
            self.lora_down = nnx.Param(size_in**-0.5 * noise)
            self.lora_up = nnx.Param(jnp.zeros((self.rank, size_out), jnp.float32))

    def __call__(self, x: Array) -> Array:
        if x.ndim > 2 and current_mesh() is None:
            return _flat(self, x)
        y = x @ self.kernel[...].astype(x.dtype)
        if self.rank:
            y = y + self.factor * ((x @ self.lora_down[...].astype(x.dtype)) @ self.lora_up[...].astype(x.dtype))
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y


class Attention(nnx.Module):
    """Grouped-query attention within segments."""

    def __init__(self, settings: ModelSettings, *, rngs: nnx.Rngs):
        s = settings
        bias = s.qkv_bias or s.linear_bias
        self.head_dim = s.head_dim
        inner, inner_kv = s.attention_heads * s.head_dim, s.kv_heads * s.head_dim
        make = functools.partial(Projection, rngs=rngs, adapter=(s.lora_rank, s.lora_scale))
        self.query = make(s.width, inner, bias=bias, scale=s.initial_scale)
        self.key = make(s.width, inner_kv, bias=bias, scale=s.initial_scale)
        self.value = make(s.width, inner_kv, bias=bias, scale=s.initial_scale)
        self.output = make(inner, s.width, bias=s.output_bias or s.linear_bias, scale=_residual_scale(s))
        self.qk_norm = s.qk_norm
        if s.qk_norm:
            self.query_norm = Norm(s.head_dim, s, kind="rmsnorm")
            self.key_norm = Norm(s.head_dim, s, kind="rmsnorm")

    def project(self, x: Array, rotary: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        """`x [B, S, D] -> (query [B, S, N, C], key [B, S, K, C], value [B, S, K, C])`, normed and rotated."""
        query, key, value = (
            projection(x).reshape(*x.shape[:-1], -1, self.head_dim)
            for projection in (self.query, self.key, self.value)
        )
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return query, key, value

    def __call__(self, x: Array, context: Context) -> Array:
        query, key, value = self.project(x, context.rotary)
        query, key, value = constrain(query, "query"), constrain(key, "key"), constrain(value, "key")
        mixed = attend(query, key, value, context.mask).reshape(*x.shape[:-1], -1)
        return self.output(constrain(mixed, "mixed"))


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202) or GELU."""

    def __init__(self, settings: ModelSettings, *, rngs: nnx.Rngs):
        s = settings
        bias = s.mlp_bias or s.linear_bias
        self.gated = s.activation == "swiglu"
        make = functools.partial(Projection, bias=bias, rngs=rngs, adapter=(s.lora_rank, s.lora_scale))
        if self.gated:
            self.gate = make(s.width, s.mlp_width, scale=s.initial_scale)
        self.up = make(s.width, s.mlp_width, scale=s.initial_scale)
        self.down = make(s.mlp_width, s.width, scale=_residual_scale(s))

    def __call__(self, x: Array) -> Array:
        if x.ndim > 2 and current_mesh() is None:
            return _flat(self, x)
        if self.gated:
            return self.down(constrain(_gated(self.gate(x), self.up(x)), "mlp"))
        return self.down(constrain(jax.nn.gelu(self.up(x), approximate=True), "mlp"))


# The backward pass keeps what goes in and makes the three F-wide arrays between anew: a sixth of the temporary memory of an
# update at (V 8,192, D 256, 6 layers), for no product.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


class Layer(nnx.Module):
    """One pre-norm transformer layer, `[B, S, D] -> [B, S, D]`."""

    def __init__(self, settings: ModelSettings, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(settings.width, settings)
        self.attention = Attention(settings, rngs=rngs)
        self.mlp_norm = Norm(settings.width, settings)
        self.mlp = FeedForward(settings, rngs=rngs)

    def __call__(self, x: Array, context: Context) -> Array:
        x = constrain(x + self.attention(self.attention_norm(x), context), "states")
        return constrain(x + self.mlp(self.mlp_norm(x)), "states")


def stack(make, count: int, *, rngs: nnx.Rngs):
    """`count` modules made by `make(rngs)` as one, its parameters with a leading axis of `count`; None for 0."""
    if count == 0:
        return None

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs):
        return make(rngs)

    return build(rngs)


def _residual_scale(settings: ModelSettings) -> float:
    # The residual stream is a sum of 2 * layers branches (GPT-2, section 2.3).
    return settings.initial_scale / math.sqrt(2 * settings.layers)
