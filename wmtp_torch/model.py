"""The model: a decoder trunk, H prediction heads and, where asked for, a value head; the mirror of `wmtp_jax.model`.

Parameters have the names, shapes and meaning of the JAX model's, layers stacked. A stack is unbound once a forward pass, so
that its gradient is written once, as one stack.

Shapes: B rows, S positions, D width, N query heads, K key/value heads, C head size, F mlp width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from wmtp_jax.data.targets import positions as segment_positions
from wmtp_jax.settings import ModelSettings, rotary_frequencies

Array = torch.Tensor
Parameters = dict[str, Array]

# ---- the parts of a decoder layer --------------------------------------------------------------------------------------


class Context(NamedTuple):
    """What every layer of one forward pass shares: rotary tables and the attention mask.

    Attributes:
      rotary: (cos, sin) `[B, S, C]` float32, or None for learned positions.
      mask: `[B, 1, S, S]` in the compute type, what is added to the scores: 0 where query position s may read key position t.
    """

    rotary: tuple[Array, Array] | None
    mask: Array


class Initial(NamedTuple):
    """Makes float32 parameters: random ones from `generator`, shapes alone (on `meta`) without; `lead` are axes of stacks."""

    generator: torch.Generator | None
    lead: tuple[int, ...] = ()

    def normal(self, scale: float, *shape: int) -> nn.Parameter:
        parameter = self.full(0.0, *shape)
        return nn.init.normal_(parameter, std=scale, generator=self.generator) if self.generator else parameter  # pyrefly: ignore[bad-return]  # itself

    def full(self, value: float, *shape: int) -> nn.Parameter:
        device = "cpu" if self.generator else "meta"
        return nn.Parameter(torch.full((*self.lead, *shape), value, dtype=torch.float32, device=device))


def rotary_tables(positions: Array, frequencies: Array, settings: ModelSettings) -> tuple[Array, Array]:
    """Cosines and sines of the rotary embedding (arXiv 2104.09864), `[B, S, C]`, both halves of C alike."""
    angles = torch.cat([positions[..., None].float() * frequencies] * 2, dim=-1)
    return torch.cos(angles) * settings.rope_attention_factor, torch.sin(angles) * settings.rope_attention_factor


def rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    """Applies the tables to `x [B, S, heads, C]`; pairs are (i, i + C/2), as in the published Llama weights."""
    cos, sin = (table[:, :, None, :].to(x.dtype) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_mask(segment_ids: Array, dtype: torch.dtype) -> Array:
    """`[B, S] -> [B, 1, S, S]`: causal, and within one segment. Padding (0) reads padding, so that no row is empty.

    To be added, since torch would make the same of a boolean one anew, and keep it, in every layer.
    """
    length = segment_ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    readable = causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return torch.zeros_like(readable, dtype=dtype).masked_fill_(~readable, -math.inf)[:, None]


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Softmax attention, `[B, S, N, C]` x `[B, S, K, C]` x `[B, S, K, C]` -> `[B, S, N, C]`; softmax in float32.

    torch's own function: as exact as matrix products, a fifth of their time on a CPU, and on MPS made of them.
    """
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias, over the last axis; computed in float32."""

    def __init__(self, size: int, settings: ModelSettings, *, initial: Initial, kind: str | None = None):
        super().__init__()
        self.epsilon, self.scale = settings.norm_epsilon, initial.full(1.0, size)
        self.bias = initial.full(0.0, size) if (kind or settings.norm) == "layernorm" else None

    def forward(self, x: Array) -> Array:
        wide, size = x.float(), x.shape[-1:]
        if self.bias is None:
            return F.rms_norm(wide, size, self.scale, self.epsilon).to(x.dtype)
        return F.layer_norm(wide, size, self.scale, self.bias, self.epsilon).to(x.dtype)


class Projection(nn.Module):
    """`y = x @ kernel (+ bias)`, kernel `[in, out]`; cast to the type of `x`.

    With an `adapter` (rank, factor), `y` also has `factor * (x @ lora_down) @ lora_up`, see `trainable.py`.
    """

    def __init__(
        self, size_in: int, size_out: int, *, bias: bool, scale: float, initial: Initial, adapter: tuple[int, float] = (0, 1.0)
    ):
        super().__init__()
        self.kernel = initial.normal(scale, size_in, size_out)
        self.bias = initial.full(0.0, size_out) if bias else None
        self.rank, self.factor = adapter
        if self.rank:
            self.lora_down = initial.normal(size_in**-0.5, size_in, self.rank)
            self.lora_up = initial.full(0.0, self.rank, size_out)

    def forward(self, x: Array) -> Array:
        y = x @ self.kernel.to(x.dtype)
        if self.rank:
            y = y + self.factor * ((x @ self.lora_down.to(x.dtype)) @ self.lora_up.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention within segments."""

    def __init__(self, settings: ModelSettings, *, initial: Initial):
        super().__init__()
        s = settings
        inner, inner_kv = s.attention_heads * s.head_dim, s.kv_heads * s.head_dim
        make = functools.partial(Projection, initial=initial, adapter=(s.lora_rank, s.lora_scale))
        project = functools.partial(make, s.width, scale=s.initial_scale)
        bias = s.qkv_bias or s.linear_bias
        self.head_dim = s.head_dim
        self.query, self.key, self.value = (project(size, bias=bias) for size in (inner, inner_kv, inner_kv))
        bias = s.output_bias or s.linear_bias
        self.output = make(inner, s.width, bias=bias, scale=_residual_scale(s))
        norms = (Norm(s.head_dim, s, kind="rmsnorm", initial=initial) if s.qk_norm else None for _ in range(2))
        self.query_norm, self.key_norm = norms

    def forward(self, x: Array, context: Context) -> Array:
        query, key, value = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.query, self.key, self.value))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)  # pyrefly: ignore[not-callable]  # both or none
        if context.rotary is not None:
            query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        return self.output(attend(query, key, value, context.mask).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) or GELU."""

    def __init__(self, settings: ModelSettings, *, initial: Initial):
        super().__init__()
        s = settings
        options = {"bias": s.mlp_bias or s.linear_bias, "initial": initial, "adapter": (s.lora_rank, s.lora_scale)}
        widen = functools.partial(Projection, s.width, s.mlp_width, scale=s.initial_scale, **options)
        self.gate = widen() if s.activation == "swiglu" else None
        self.up = widen()
        self.down = Projection(s.mlp_width, s.width, scale=_residual_scale(s), **options)

    def forward(self, x: Array) -> Array:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """One pre-norm transformer layer, `[B, S, D] -> [B, S, D]`."""

    def __init__(self, settings: ModelSettings, *, initial: Initial):
        super().__init__()
        self.attention_norm = Norm(settings.width, settings, initial=initial)
        self.attention = Attention(settings, initial=initial)
        self.mlp_norm = Norm(settings.width, settings, initial=initial)
        self.mlp = FeedForward(settings, initial=initial)

    def forward(self, x: Array, context: Context) -> Array:
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


def stack(make: Callable[..., nn.Module], count: int, *, initial: Initial) -> nn.Module | None:
    """`count` modules made by `make` as one, its parameters with a leading axis of `count`; None for 0. See `unstack`."""
    return make(initial=initial._replace(lead=(count,))) if count else None


def unstack(stacked: nn.Module | None) -> list[Callable[..., Array]]:
    """The modules of a stack, to be called in their order."""
    if stacked is None:
        return []
    named = dict(stacked.named_parameters())
    parts = zip(*(parameter.unbind() for parameter in named.values()), strict=True)
    return [functools.partial(_call, stacked, dict(zip(named, part, strict=True))) for part in parts]


def _call(module: nn.Module, parameters: Parameters, *arguments: Array | Context) -> Array:
    return torch.func.functional_call(module, parameters, arguments)


def _residual_scale(settings: ModelSettings) -> float:
    # The residual stream is a sum of 2 * layers branches (GPT-2, section 2.3).
    return settings.initial_scale / math.sqrt(2 * settings.layers)


# ---- the model ---------------------------------------------------------------------------------------------------------


class SequentialHead(nn.Module):
    """One depth of DeepSeek-V3's MTP (arXiv 2412.19437, eq. 21-23), in the form that published weights have.

    `h_k = output_norm(layer(project([embedding_norm(e(x[s+k])); hidden_norm(h_{k-1})])))`; h_0 is the trunk's
    normed output, and h_k is both what the unembedding reads and what the next depth takes.
    """

    def __init__(self, settings: ModelSettings, *, initial: Initial):
        super().__init__()
        s = settings
        self.embedding_norm = Norm(s.width, s, initial=initial)
        self.hidden_norm = Norm(s.width, s, initial=initial)
        self.project = Projection(2 * s.width, s.width, bias=False, scale=s.initial_scale, initial=initial)
        self.layer = Layer(s, initial=initial)
        self.output_norm = Norm(s.width, s, initial=initial)

    def forward(self, previous: Array, embedded: Array, context: Context) -> Array:
        joined = torch.cat([self.embedding_norm(embedded), self.hidden_norm(previous)], dim=-1)
        return self.output_norm(self.layer(self.project(joined), context))


class ValueHead(nn.Module):
    """`[B, S, D] -> [B, S]` float32: D -> D/2 -> 1 with a GELU between, on states of root mean square 1."""

    def __init__(self, settings: ModelSettings, *, initial: Initial):
        super().__init__()
        width, self.epsilon = settings.width, settings.norm_epsilon
        self.inner = Projection(width, width // 2, bias=True, scale=width**-0.5, initial=initial)
        self.outer = Projection(width // 2, 1, bias=True, scale=0.0, initial=initial)

    def forward(self, hidden: Array) -> Array:
        inner = self.inner(F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.epsilon))
        return self.outer(F.gelu(inner, approximate="tanh"))[..., 0]


class Model(nn.Module):
    """Decoder with H heads.

    Parameters, by path: `embedding [V, D]`, `position_embedding [P, D]` (learned), `layers.*` stacked over the trunk's
    layers, `final_norm.*`, `unembedding [D, V]` (absent where tied), and by head kind
      linear: `heads [H-1, D, V]`, the unembeddings of heads 1.. (head 0 has the trunk's);
      block: `heads.*` layers stacked over H, head 0 being the trunk's last layer, so `layers.*` has one fewer;
      sequential: `heads.*` stacked over the H-1 depths after the first.

    Args:
      settings: what it is.
      value_head: whether it has one, under `value_head.*`.
      generator: of random parameters; None: shapes alone, for `merge`.
    """

    def __init__(self, settings: ModelSettings, *, value_head: bool = False, generator: torch.Generator | None = None):
        super().__init__()
        s, initial = settings, Initial(generator)
        self.settings, self.dtype = s, getattr(torch, s.compute_dtype)
        self.register_buffer("frequencies", torch.from_numpy(rotary_frequencies(s)), persistent=False)
        self.embedding = initial.normal(s.initial_scale, s.vocabulary_size, s.width)
        if s.positions == "learned":
            self.position_embedding = initial.normal(s.initial_scale, s.max_positions, s.width)
        plain = dataclasses.replace(s, lora_rank=0)  # adapters are the trunk's
        layer = functools.partial(Layer, plain)
        self.layers = stack(functools.partial(Layer, s), s.layers - (s.head_kind == "block"), initial=initial)
        self.final_norm = Norm(s.width, s, initial=initial)
        if not s.tie_embeddings:
            self.unembedding = initial.normal(s.initial_scale, s.width, s.vocabulary_size)
        match s.head_kind:
            case "linear":
                shape = (s.num_heads - 1, s.width, s.vocabulary_size)
                self.heads = initial.normal(s.initial_scale, *shape) if s.num_heads > 1 else None
            case "block":
                self.heads = stack(layer, s.num_heads, initial=initial)
            case "sequential":
                self.heads = stack(functools.partial(SequentialHead, plain), s.num_heads - 1, initial=initial)
        self.value_head = ValueHead(s, initial=initial) if value_head else None

    # ---- the trunk -------------------------------------------------------------------------------------------------

    def embed(self, tokens: Array) -> Array:
        """Token embeddings `[..., D]` in the compute type."""
        return F.embedding(tokens, self.embedding).to(self.dtype)

    def context(self, segment_ids: Array, positions: Array) -> Context:
        """What the layers of this batch share; `segment_ids`, `positions` `[B, S]`."""
        s = self.settings
        rotary = rotary_tables(positions, self.frequencies, s) if s.positions == "rope" else None
        return Context(rotary, attention_mask(segment_ids, self.dtype))

    def trunk(self, tokens: Array, positions: Array, context: Context) -> Array:
        """The hidden states that the heads share, `[B, S, D]`: after the last layer and the final norm for `linear` and
        `sequential` heads, before the last layer for `block` heads."""
        s = self.settings
        x = self.embed(tokens)
        if s.positions == "learned":
            x = x + F.embedding(positions, self.position_embedding).to(x.dtype)
        for layer in unstack(self.layers):
            x = _remat(layer, s.remat)(x, context)
        return x if s.head_kind == "block" else self.final_norm(x)

    def unembed(self) -> Array:
        """The trunk's unembedding, `[D, V]`."""
        return self.embedding.T if self.settings.tie_embeddings else self.unembedding

    # ---- the heads -------------------------------------------------------------------------------------------------

    def head_groups(
        self, shared: Array, tokens: Array, context: Context, *, num_heads: int | None = None
    ) -> list[tuple[Array, Array]]:
        """What the heads' logits are made of, as few products as can be: (final hidden states, unembedding) of each group.

        A group is either h heads that share their states, `[B, S, D]` with `[h, D, V]`, or h heads that share their
        unembedding, `[B, S, h, D]` with `[D, V]`. The groups' heads, one group after the other, are heads 0, 1, ...

        The layers of `block` and `sequential` heads run one after the other, each under `torch.utils.checkpoint`, so that no
        more than one head's layer is held, forward or backward.

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
                # A slice of everything would still cost a copy of its gradient.
                heads = self.heads if count == self.settings.num_heads else self.heads[: count - 1]  # pyrefly: ignore[bad-index, unsupported-operation]  # one tensor
                return groups + [(shared, heads)] if count > 1 else groups  # pyrefly: ignore[bad-return]  # one tensor
            case "block":
                blocks = [functools.partial(self._block, block) for block in unstack(self.heads)[:count]]
                states = [_remat(block, "layer")(shared, context) for block in blocks]
            case _:
                states = [shared]
                for k, depth in enumerate(unstack(self.heads)[: count - 1], start=1):
                    ahead = self.embed(F.pad(tokens, (0, k))[:, k:])
                    states.append(_remat(depth, "layer")(states[-1], ahead, context))
        return [(torch.stack(states, dim=2), unembedding)]

    def _block(self, block: Callable[..., Array], shared: Array, context: Context) -> Array:
        return self.final_norm(block(shared, context))

    def logits(self, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None) -> Array:
        """Every head's logits `[B, S, H, V]` in float32, for checks and small inputs: training never makes them.

        `tokens [B, S]` int; without `segment_ids` every row is one segment and every token is real.
        """
        tokens, s = torch.as_tensor(tokens, device=self.embedding.device), self.settings
        if segment_ids is None and s.positions == "learned" and tokens.shape[-1] > s.max_positions:
            raise ValueError(f"{tokens.shape[-1]} tokens: the model has {s.max_positions} learned positions")
        given = torch.ones_like(tokens) if segment_ids is None else segment_ids
        segment_ids = torch.as_tensor(given, device=tokens.device)
        given = segment_positions(segment_ids.cpu().numpy()) if positions is None else positions
        positions = torch.as_tensor(given, device=tokens.device)
        context = self.context(segment_ids, positions)
        shared, logits = self.trunk(tokens, positions, context), []
        for states, unembedding in self.head_groups(shared, tokens, context):
            subscripts = "bsd,hdv->bshv" if unembedding.ndim == 3 else "bshd,dv->bshv"
            logits.append(torch.einsum(subscripts, states.float(), unembedding.to(states.dtype).float()))
        return torch.cat(logits, dim=2)


def _remat(function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    if kind == "none":
        return function
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    options = {"context_fn": kept} if kind == "dots" else {}
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, **options)


# ---- a model and its parameters ----------------------------------------------------------------------------------------


def merge(settings: ModelSettings, parameters: Mapping[str, Array]) -> Model:
    """The model with these very parameters, on their device; with a value head where they have one."""
    model = Model(settings, value_head=any(name.startswith("value_head.") for name in parameters))
    model.load_state_dict(parameters, assign=True)
    return model.to(parameters["embedding"].device)


def initial_parameters(settings: ModelSettings, seed: int, *, value_head: bool = False) -> Parameters:
    """A model's random parameters on the CPU, a function of the seed alone: JAX's distribution, not its numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {k: p.detach() for k, p in Model(settings, value_head=value_head, generator=generator).named_parameters()}
