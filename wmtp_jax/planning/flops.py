"""Floating-point operations of a model by formula; for MFU (arXiv 2204.02311, appendix B)."""

from __future__ import annotations

from wmtp_jax.settings import ModelSettings


def flops_per_token(settings: ModelSettings, sequence_length: int, *, trained: str = "all") -> float:
    """Operations of forward and backward for one token: 6 for every weight that multiplies, and attention's products
    over the whole square, 12 S N C a layer. Recomputation, norms and softmax are not counted.

    A third each is the forward pass, the gradient of the states and that of the weights: frozen layers below adapters
    (`trained` lora) leave away the last, and a frozen trunk (heads) both; adapters themselves are not counted.
    """
    s, layer = settings, _layer(settings, sequence_length)
    extra_heads, logits = s.num_heads - 1, 6 * s.width * s.vocabulary_size
    head = {"linear": 0, "block": layer, "sequential": layer + 6 * 2 * s.width * s.width}[s.head_kind]
    trunk = {"all": 1, "lora": 2 / 3, "heads": 1 / 3}[trained]
    # Heads that share the trunk's unembedding make no gradient of it, `linear` ones on a frozen trunk none of their states.
    unembedding = 1 if trained == "all" or (s.head_kind == "linear" and trained == "lora") else 2 / 3
    return float(trunk * (s.layers * layer + logits) + extra_heads * (head + unembedding * logits))


def trunk_flops_per_token(settings: ModelSettings, sequence_length: int) -> float:
    """Operations of the forward pass to the hidden states that the heads share: a third of its layers' share above."""
    layers = settings.layers - (settings.head_kind == "block")
    return layers * _layer(settings, sequence_length) / 3


def recomputed_flops_per_token(settings: ModelSettings, sequence_length: int, *, trained: str = "all") -> float:
    """Operations that the backward pass does a second time instead of having kept what the forward pass made: every
    tile of logits, the layers of `block` and `sequential` heads, and the trunk's as `remat` says."""
    s, layer = settings, _layer(settings, sequence_length)
    logits = 2 * s.num_heads * s.width * s.vocabulary_size
    heads = {"linear": 0, "block": s.num_heads, "sequential": s.num_heads - 1}[s.head_kind] * layer / 3
    if s.head_kind == "sequential":
        heads += (s.num_heads - 1) * 4 * s.width * s.width
    # What the last product of a layer gives is not needed again; of `dots`, only products of two activations are made again.
    by_layer = {
        "none": 0.0,
        "layer": layer / 3 - 2 * s.width * s.mlp_width,
        "dots": 4 * sequence_length * s.attention_heads * s.head_dim,
    }[s.remat]
    layers = s.layers - (s.head_kind == "block")
    return float(logits + heads + (layers * by_layer if trained != "heads" else 0.0))


def _layer(s: ModelSettings, sequence_length: int) -> float:
    attention_weights = s.width * s.head_dim * (2 * s.attention_heads + 2 * s.kv_heads)
    mlp_weights = s.width * s.mlp_width * (3 if s.activation == "swiglu" else 2)
    return 6 * (attention_weights + mlp_weights) + 12 * sequence_length * s.attention_heads * s.head_dim
