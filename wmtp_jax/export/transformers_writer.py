"""A model as the plain `transformers` architecture that it is: trunk and head 0. The tables are the reader's.

Which architecture a model is follows from its settings alone; a combination that none has is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.export.whole import Lazy, Whole
from wmtp_jax.pretrained.published import layer_shapes, outer_shapes
from wmtp_jax.pretrained.transformers_format import FAMILIES
from wmtp_jax.settings import ModelSettings

Config = dict[str, Any]


def family_of(whole: Whole) -> str:
    """The `model_type` whose function is the model's: llama, qwen2, qwen3 or gpt2.

    Raises:
      UserError: none has it; names the settings that do not go together.
    """
    s = whole.settings
    named = "activation", "norm", "positions"
    kinds = tuple(getattr(s, name) for name in named)
    qkv_bias, output_bias, mlp_bias = (bias or s.linear_bias for bias in (s.qkv_bias, s.output_bias, s.mlp_bias))

    def refuse(*names: str) -> UserError:
        given = ", ".join(f"model.{name} = {getattr(s, name)!r}" for name in names)
        return UserError(
            f"{whole.path}: {given}: none of {', '.join(FAMILIES)} in transformers has this combination, and it is not "
            "approximated; export needs a model of one of these kinds"
        )

    match kinds:
        case ("gelu", "layernorm", "learned"):
            if not s.linear_bias or s.qk_norm:
                raise refuse(*named, "linear_bias", "qk_norm")
            if s.kv_heads != s.attention_heads or s.head_dim * s.attention_heads != s.width:
                raise refuse(*named, "attention_heads", "kv_heads", "head_dim", "width")
            return "gpt2"
        case ("swiglu", "rmsnorm", "rope"):
            if s.qk_norm:
                if qkv_bias != output_bias or mlp_bias:
                    raise refuse("qk_norm", "qkv_bias", "output_bias", "mlp_bias", "linear_bias")
                return "qwen3"
            if qkv_bias and not output_bias and not mlp_bias:
                return "qwen2"
            if qkv_bias != output_bias:
                raise refuse("qkv_bias", "output_bias", "mlp_bias", "linear_bias")
            return "llama"
    raise refuse(*named)


def config_of(whole: Whole, family: str) -> Config:
    """`config.json`: the published one where the model came from `transformers`, otherwise made from the settings."""
    origin = whole.origin
    special = {"bos_token_id": whole.begin_of_text, "eos_token_id": whole.end_of_text, "pad_token_id": None}
    if origin.get("format") == "transformers" and origin["family"] == family:
        config = {key: value for key, value in origin["config"].items() if key not in _OWN_TO_A_FILE}
        config = {key: value for key, value in special.items() if value is not None} | config
    else:
        config = _settings_as_config(whole.settings, family) | special
    return config | {"architectures": [FAMILIES[family].classes[0]], "model_type": family, "dtype": "float32"}


def generation_config_of(whole: Whole, config: Config) -> Config:
    """`generation_config.json`: the published one, or what begins and ends a text; with every token that ends one."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    made = whole.origin.get("generation_config") or {key: config[key] for key in special if config.get(key) is not None}
    ends = list(whole.end_tokens)
    return made | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def trunk_tensors(whole: Whole, family: str) -> dict[str, Lazy]:
    """Every tensor of the plain model by its published name."""
    table = FAMILIES[family]
    tensors = {}
    for name in outer_shapes(whole.settings):
        stored = table.outer[name]
        transposed = name == "unembedding"
        tensors[stored if transposed else table.prefix + stored] = whole.lazy(name, transposed=transposed)
    for i in range(whole.settings.layers):
        tensors |= layer_tensors(whole, family, f"layers.{i}", f"{table.prefix}{table.layers}.{i}")
    return tensors


def layer_tensors(whole: Whole, family: str, ours: str, stored: str) -> dict[str, Lazy]:
    """The tensors of one layer: `ours` is its name here, `stored` there."""
    return {f"{stored}.{name}": lazy for name, lazy in _layer(whole, family, ours)}


def _layer(whole: Whole, family: str, ours: str) -> Iterator[tuple[str, Lazy]]:
    table = FAMILIES[family]
    for path in layer_shapes(whole.settings):
        module, part = path.rsplit(".", 1)
        suffix = "bias" if part == "bias" else "weight"
        theirs = table.layer[module]
        if theirs != "attn.c_attn":
            transposed = part == "kernel" and table.transposed
            yield f"{theirs}.{suffix}", whole.lazy(f"{ours}.{path}", transposed=transposed)
        elif module == "attention.query":  # GPT-2 keeps query, key and value side by side
            parts = [f"{ours}.attention.{name}.{part}" for name in ("query", "key", "value")]
            shape = whole.read(parts[0]).shape
            yield (
                f"{theirs}.{suffix}",
                ((*shape[:-1], 3 * shape[-1]), lambda parts=parts: np.concatenate([*map(whole.read, parts)], axis=-1)),
            )


# ---- config.json ---------------------------------------------------------------------------------------------------

# What a published config.json says of its own file, or of what it was read with; heads that others declare stay behind.
_OWN_TO_A_FILE = frozenset(
    "_name_or_path torch_dtype dtype transformers_version architectures auto_map id2label label2id num_labels problem_type "
    "num_mtp_layers mtp_layer_types num_nextn_predict_layers".split()
)


def _settings_as_config(s: ModelSettings, family: str) -> Config:
    if family == "gpt2":
        return {
            "vocab_size": s.vocabulary_size,
            "n_embd": s.width,
            "n_layer": s.layers,
            "n_head": s.attention_heads,
            "n_inner": s.mlp_width,
            "n_positions": s.max_positions,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": s.norm_epsilon,
            "initializer_range": s.initial_scale,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": s.tie_embeddings,
        }
    config = {
        "vocab_size": s.vocabulary_size,
        "hidden_size": s.width,
        "intermediate_size": s.mlp_width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.attention_heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": s.max_positions,
        "rms_norm_eps": s.norm_epsilon,
        "initializer_range": s.initial_scale,
        "attention_dropout": 0.0,
        "tie_word_embeddings": s.tie_embeddings,
        **_rope_as_config(s),
    }
    match family:
        case "llama":
            config |= {"attention_bias": s.qkv_bias or s.linear_bias, "mlp_bias": s.mlp_bias or s.linear_bias}
        case "qwen2":
            config |= {"use_sliding_window": False, "layer_types": ["full_attention"] * s.layers}
        case "qwen3":
            bias = s.qkv_bias or s.linear_bias
            config |= {"attention_bias": bias, "use_sliding_window": False, "layer_types": ["full_attention"] * s.layers}
    return config


def _rope_as_config(s: ModelSettings) -> Config:
    """The rotary embedding in the spelling of `transformers` 5 and, for engines that read the older one, in that as well."""
    scaling: Config = {"rope_type": "default" if s.rope_scaling == "none" else s.rope_scaling}
    if s.rope_scaling != "none":
        scaling["factor"] = s.rope_factor
    if s.rope_scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = s.rope_original_positions
    if s.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": s.rope_low_frequency, "high_freq_factor": s.rope_high_frequency}
    if s.rope_scaling == "yarn":
        scaling |= {"beta_fast": s.rope_beta_fast, "beta_slow": s.rope_beta_slow, "truncate": s.rope_truncate}
        expected = 1.0 if s.rope_factor <= 1 else 0.1 * math.log(s.rope_factor) + 1.0
        if s.rope_attention_factor != expected:
            scaling["attention_factor"] = s.rope_attention_factor
    older = {} if s.rope_scaling == "none" else {"rope_scaling": dict(scaling)}
    return {"rope_theta": s.rope_theta, "rope_parameters": {"rope_theta": s.rope_theta, **scaling}, **older}
