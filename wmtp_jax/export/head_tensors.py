"""Prediction heads after head 0, in the names and layouts of others; what each layout can't express is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.export.transformers_writer import layer_tensors
from wmtp_jax.export.whole import Lazy, Whole
from wmtp_jax.pretrained.transformers_format import HEADS_FILE

_EQUATIONS = {
    "linear": (
        "logits_k = hidden @ heads.{k}.weight.T; hidden [S, D] is the model's last hidden state, after its final norm, which "
        "head 0's unembedding reads as well"
    ),
    "block": (
        "logits_k = lm_head(final_norm(layer_k(x))); x [S, D] is what the model's last decoder layer reads, layer_k a decoder "
        "layer of the same class with the tensors heads.{k}.*; final norm and unembedding are the model's; head 0's layer is "
        "the model's last"
    ),
    "sequential": (
        "h_k = post_norm(layer_k(eh_proj([enorm(embedding(x[s + k])); hnorm(h_(k-1))]))), logits_k = lm_head(h_k); h_0 [S, D] "
        "is the model's last hidden state, after its final norm; layer_k is a decoder layer of the model's class, the "
        "embedding is the model's; all norms are of the model's kind"
    ),
}


def described_heads(whole: Whole, family: str) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """Heads of any kind for `wmtp_heads.safetensors`, and the description beside it."""
    s = whole.settings
    tensors: dict[str, Lazy] = {}
    for k in whole.extra_heads:
        name = f"heads.{k}"
        match s.head_kind:
            case "linear":
                tensors[f"{name}.weight"] = whole.lazy(name, transposed=True)
            case "block":
                tensors |= layer_tensors(whole, family, name, name)
            case "sequential":
                tensors |= _joining(whole, name, name, output="post_norm")
                tensors |= layer_tensors(whole, family, f"{name}.layer", name)
    description = {
        "format": 1,
        "file": HEADS_FILE,
        "num_heads": s.num_heads,
        "head_kind": s.head_kind,
        "layer": family,
        "heads": [
            {"head": k, "predicts": f"token s + {1 + k} at position s", "in": HEADS_FILE if k else "model.safetensors"}
            for k in range(s.num_heads)
        ],
        "equation": _EQUATIONS[s.head_kind],
        "tensors": "heads.{k}.NAME, where NAME of a layer is as in the model's own decoder layers; float32",
    }
    return tensors, description


def deepseek_layers(whole: Whole, family: str) -> dict[str, Lazy]:
    """`sequential` heads as decoder layers `model.layers.{L}` and on, eh_proj over [embedding; hidden].

    Raises:
      UserError: heads of another kind or none, or an architecture without the rotary layers that `use_mtp` runs.
    """
    _check_kind(whole, "hf-mtp", "sequential", "transformers' generate(use_mtp=True) chains depths")
    if family == "gpt2":
        raise UserError(
            f"{whole.path}: --to=hf-mtp: GPT-2 has neither RMSNorm nor a rotary embedding, which the layers of "
            "generate(use_mtp=True) are made of; --to=hf writes its heads with a description"
        )
    tensors: dict[str, Lazy] = {}
    for k in whole.extra_heads:
        stored = f"model.layers.{whole.settings.layers + k - 1}"
        tensors |= _joining(whole, f"heads.{k}", stored, output="shared_head.norm")
        tensors |= layer_tensors(whole, family, f"heads.{k}.layer", stored)
    return tensors


def medusa_heads(whole: Whole) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """`linear` heads as vLLM's Medusa draft model: x + SiLU(W x) with W = 0, then an unembedding each; and its config.

    Raises:
      UserError: heads of another kind or none.
    """
    _check_kind(whole, "medusa", "linear", "a Medusa head reads one hidden state and has no layer")
    width, vocabulary, count = whole.settings.width, whole.settings.vocabulary_size, whole.settings.num_heads - 1
    tensors: dict[str, Lazy] = {}
    for i in range(count):
        tensors[f"blocks.{i}.layers.0.weight"] = (width, width), lambda: np.zeros((width, width), np.float32)
    for i in range(count):
        tensors[f"lm_heads.{i}.weight"] = whole.lazy(f"heads.{i + 1}", transposed=True)
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": width,
        "vocab_size": vocabulary,
        "truncated_vocab_size": vocabulary,
        "num_heads": count,
        "num_hidden_layers": 1,
        "medusa_fc_bias": False,
        "max_paths": 64,
        "topk": 10,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    return tensors, config


def check_mimo(whole: Whole, family: str) -> None:
    """Refuses what a MiMo model (Qwen2 with one more layer) is not.

    Raises:
      UserError: names what can't be expressed.
    """
    _check_kind(whole, "mimo", "sequential", "MiMo's layer joins a hidden state and an embedding")
    s = whole.settings
    refusals = {
        f"it has {s.num_heads - 1} heads after head 0, and the loaders of vLLM and SGLang run one": s.num_heads != 2,
        "GPT-2 is no Qwen2": family == "gpt2",
        "MiMo's layers have no norms of queries and keys (Qwen3)": s.qk_norm,
        "MiMo's layers have no bias after attention (attention_bias)": s.output_bias or s.linear_bias,
        "MiMo's layers have no bias in their feed-forward part (mlp_bias)": s.mlp_bias or s.linear_bias,
        f"MiMo's attention heads are hidden_size / num_attention_heads wide, not {s.head_dim}": (
            s.head_dim * s.attention_heads != s.width
        ),
    }
    for reason, applies in refusals.items():
        if applies:
            raise UserError(f"{whole.path}: --to=mimo: {reason}; --to=hf and, for its heads, --to=hf-mtp may")


def mimo_tensors(trunk: dict[str, Lazy], whole: Whole) -> dict[str, Lazy]:
    """A Qwen2 with one MiMo layer, input_proj over [hidden; embedding]; zero biases where the model has none.

    The unembedding is there by itself where it is tied, since the loaders of drafts look for it.

    Args:
      trunk: the tensors of the plain model, Llama or Qwen2.
      whole: what they are of, with one `sequential` head.
    """
    width = whole.settings.width
    tensors = dict(trunk)
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    stored, ours = "model.mtp_layers.0", "heads.1"
    tensors[f"{stored}.token_layernorm.weight"] = whole.lazy(f"{ours}.embedding_norm.scale")
    tensors[f"{stored}.hidden_layernorm.weight"] = whole.lazy(f"{ours}.hidden_norm.scale")
    tensors[f"{stored}.final_layernorm.weight"] = whole.lazy(f"{ours}.output_norm.scale")

    def hidden_first() -> np.ndarray:
        kernel = whole.read(f"{ours}.project.kernel")
        return np.concatenate([kernel[width:], kernel[:width]]).T

    tensors[f"{stored}.input_proj.weight"] = (width, 2 * width), hidden_first
    tensors |= layer_tensors(whole, "qwen2", f"{ours}.layer", stored)
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        size = tensors[name][0][0]
        bias = name.removesuffix("weight") + "bias"
        tensors.setdefault(bias, ((size,), lambda size=size: np.zeros(size, np.float32)))
    return tensors


def _joining(whole: Whole, ours: str, stored: str, *, output: str) -> dict[str, Lazy]:
    """The norms and the projection of a `sequential` head."""
    tensors = {f"{stored}.eh_proj.weight": whole.lazy(f"{ours}.project.kernel", transposed=True)}
    for norm, theirs in (("embedding_norm", "enorm"), ("hidden_norm", "hnorm"), ("output_norm", output)):
        tensors[f"{stored}.{theirs}.weight"] = whole.lazy(f"{ours}.{norm}.scale")
        if whole.settings.norm == "layernorm":
            tensors[f"{stored}.{theirs}.bias"] = whole.lazy(f"{ours}.{norm}.bias")
    return tensors


def _check_kind(whole: Whole, to: str, kind: str, why: str) -> None:
    s = whole.settings
    if s.num_heads < 2:
        raise UserError(f"{whole.path}: --to={to}: the model has head 0 alone; --to=hf writes that")
    if s.head_kind != kind:
        raise UserError(
            f"{whole.path}: --to={to}: holds {kind} heads, and the model has {s.head_kind} ones ({why}); --to=hf writes any kind"
        )
