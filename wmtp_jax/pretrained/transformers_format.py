"""Directories as `transformers` saves them: `config.json` beside `model.safetensors` or its shards.

What a setting means, and its default where `config.json` leaves it out, is as in `transformers` 5: the families' configuration
classes, and `modeling_rope_utils` for the rotary embedding.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.pretrained.published import Published, Shape, check_counts, published_shapes
from wmtp_jax.pretrained.safetensors_file import StoredTensor, read_header, read_tensor
from wmtp_jax.pretrained.values import flag, integer, number, read_json, refuse
from wmtp_jax.settings import ModelSettings

Config = dict[str, Any]

# Our modules -> theirs, within a layer and outside; a kernel is `weight`, transposed unless the family keeps [in, out].
_LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_GPT2_LAYER = {
    "attention_norm": "ln_1",
    "attention.query": "attn.c_attn",
    "attention.key": "attn.c_attn",
    "attention.value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_LLAMA_OUTER = {"embedding": "embed_tokens.weight", "final_norm.scale": "norm.weight", "unembedding": "lm_head.weight"}
_GPT2_OUTER = {
    "embedding": "wte.weight",
    "position_embedding": "wpe.weight",
    "final_norm.scale": "ln_f.weight",
    "final_norm.bias": "ln_f.bias",
    "unembedding": "lm_head.weight",
}

# Heads beside the model, see `wmtp_jax.export.export`.
HEADS_FILE, DESCRIPTION_FILE = "wmtp_heads.safetensors", "wmtp_heads.json"
_JOINING = {"project": "eh_proj", "embedding_norm": "enorm", "hidden_norm": "hnorm", "output_norm": "post_norm"}
_DEEPSEEK_JOINING = _JOINING | {"output_norm": "shared_head.norm"}

# Settings of other architectures that scale or cap what ours does not, with the values under which they do nothing.
_FOREIGN = {
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "is_causal": (True,),  # False: attention reads both ways
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "residual_multiplier": (1.0,),
    "rotary_pct": (1.0,),
}


@dataclasses.dataclass(frozen=True)
class Family:
    settings: Callable[[Config, Path], ModelSettings]
    classes: tuple[str, ...]  # values of `architectures` whose weights are a plain language model
    classifier: str  # the one of a sequence classifier
    prefix: str  # of the base model's tensors, where the file is not of the base model alone
    layers: str
    layer: dict[str, str]
    outer: dict[str, str]
    transposed: bool  # kernels are stored [out, in]
    buffers: str  # tensors that carry nothing: constants that older versions saved


def open_directory(directory: Path, *, classifier: bool = False) -> Published:
    """Reads `config.json` and the headers of the weights and checks that both describe the same model.

    Args:
      directory: as `save_pretrained` leaves it.
      classifier: it is a sequence classifier with one label, which is a reward model: a trunk without unembedding (its
        settings say tied) and one more tensor that `read` knows, `score [D, 1]`.

    Raises:
      UserError: names the file and the key or tensor: a setting or an architecture that is not reproduced exactly, a tensor
        or shard that is missing, of another shape, or unknown.
    """
    where = directory / "config.json"
    name, settings = read_settings(where, classifier=classifier)
    family = FAMILIES[name]
    stored = _stored_tensors(directory, family.buffers)
    description, deeper = directory / DESCRIPTION_FILE, _has_deepseek_layers(read_json(where), family)
    if deeper:
        count = 1 + integer(read_json(where), "num_mtp_layers", where)
        settings = dataclasses.replace(settings, num_heads=count, head_kind="sequential")
    elif description.exists() and not classifier:
        settings, heads = _described_heads(description, name, settings)
        stored |= heads
    check_counts(settings, len(stored), where)
    prefix = family.prefix if any(key.startswith(family.prefix) for key in stored) else ""
    plan = {
        ours: _locate(ours, shape, family, prefix, settings, deeper) for ours, shape in published_shapes(settings).items()
    }
    if classifier:
        plan["score"] = _Place("score.weight", (1, settings.width), True, None)
    for ours, place in plan.items():
        _check_tensor(ours, place, stored, directory)
    left = stored.keys() - {place.name for place in plan.values()}
    left = {key for key in left if not re.search(family.buffers, key)}
    if settings.tie_embeddings and "lm_head.weight" in left:
        _check_tied(stored["lm_head.weight"], stored[plan["embedding"].name], where)
        left.remove("lm_head.weight")
    if left:
        first = min(left)
        raise UserError(
            f"{stored[first].path}: tensor {first} ({len(left)} in all) is not part of a {name} model with the settings of "
            f"{where}; it can't be left out without changing the model"
        )

    def read(ours: str) -> np.ndarray:
        place = plan[ours]
        array = read_tensor(stored[place.name])
        array = array.T if place.transposed else array
        return array if place.columns is None else array[..., place.columns]

    weights = sorted({stored[place.name].path for place in plan.values()})
    files = (where, *([description] if settings.num_heads > 1 and not deeper else []), *weights)
    beside = directory / "generation_config.json"
    generation = read_json(beside) if beside.exists() else None
    return Published(
        directory, name, settings, read, "transformers", config=read_json(where), files=files, generation_config=generation
    )


def read_settings(where: Path, *, classifier: bool = False) -> tuple[str, ModelSettings]:
    """The family and the settings that a `config.json` describes; `classifier` as for `open_directory`.

    Raises:
      UserError: names the file and the key: an architecture or a setting that is not reproduced exactly, or not a value.
    """
    config = read_json(where)
    name: Any = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise refuse(where, "model_type", name, f"supported are {', '.join(FAMILIES)}")
    _check_architecture(config, where, family, classifier)
    settings = family.settings(config, where)
    _check_settings(settings, where)
    return name, dataclasses.replace(settings, tie_embeddings=True) if classifier else settings


# ---- tensors -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """Which stored tensor holds a parameter, and how."""

    name: str
    shape: Shape  # of the stored tensor
    transposed: bool
    columns: slice | None


def _locate(ours: str, shape: Shape, family: Family, prefix: str, settings: ModelSettings, deeper: bool) -> _Place:
    stack, _, rest = ours.partition(".")
    index, _, path = rest.partition(".")
    if stack not in ("layers", "heads"):
        outer = family.outer[ours]
        transposed = ours == "unembedding"
        return _Place(outer if transposed else prefix + outer, shape[::-1] if transposed else shape, transposed, None)
    if not path:  # a `linear` head
        return _Place(f"{ours}.weight", shape[::-1], True, None)
    module, part = path.removeprefix("layer.").rsplit(".", 1)
    place = f"heads.{index}" if stack == "heads" else f"{prefix}{family.layers}.{index}"
    if deeper and stack == "heads":
        place = f"{prefix}{family.layers}.{settings.layers + int(index) - 1}"
    suffix = "bias" if part == "bias" else "weight"
    if module in _JOINING:
        joining = (_DEEPSEEK_JOINING if deeper else _JOINING)[module]
        return _Place(f"{place}.{joining}.{suffix}", shape[::-1], part == "kernel", None)
    name = f"{place}.{family.layer[module]}.{suffix}"
    if family.layer[module] == "attn.c_attn":
        third = ("attention.query", "attention.key", "attention.value").index(module)
        width = settings.width
        return _Place(name, (*shape[:-1], 3 * width), False, slice(third * width, (third + 1) * width))
    transposed = part == "kernel" and family.transposed
    return _Place(name, shape[::-1] if transposed else shape, transposed, None)


def _check_tensor(ours: str, place: _Place, stored: dict[str, StoredTensor], directory: Path) -> None:
    tensor = stored.get(place.name)
    if tensor is None:
        hint = "; tie_word_embeddings is false, so it is needed" if ours == "unembedding" else ""
        raise UserError(f"{directory}: tensor {place.name} is missing from the weights{hint}")
    if tensor.shape != place.shape:
        what = " (config.json's vocab_size does not match)" if ours in ("embedding", "unembedding") else ""
        raise UserError(
            f"{tensor.path}: tensor {place.name} has shape {tensor.shape}, and config.json asks for {place.shape}{what}"
        )


def _described_heads(
    where: Path, name: str, settings: ModelSettings
) -> tuple[ModelSettings, dict[str, StoredTensor]]:
    """The heads that `python -m wmtp_jax.export --to=hf` put beside a model, and the settings with them."""
    about = read_json(where)
    kind, layer, file = about.get("head_kind"), about.get("layer"), about.get("file")
    if about.get("format") != 1 or kind not in ("linear", "block", "sequential") or file != HEADS_FILE:
        raise UserError(f"{where}: does not describe heads that are read here (format 1, {HEADS_FILE}); export the model again")
    if layer != name:
        raise UserError(f"{where}: describes heads of a {layer} model, and config.json is of a {name}")
    count = integer(about, "num_heads", where)
    return dataclasses.replace(settings, num_heads=count, head_kind=kind), read_header(where.parent / file)


def _check_tied(head: StoredTensor, embedding: StoredTensor, where: Path) -> None:
    if head.shape != embedding.shape or not np.array_equal(read_tensor(head), read_tensor(embedding)):
        raise UserError(
            f"{where}: tie_word_embeddings is true, yet {head.path.name} holds another lm_head.weight than "
            f"{embedding.name}; set it to false if the model was trained with both"
        )


def _stored_tensors(directory: Path, buffers: str) -> dict[str, StoredTensor]:
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.exists():
        return read_header(whole, unread=buffers)
    if not index.exists():
        raise UserError(
            f"{directory}: neither {whole.name} nor {index.name} is here; weights in other formats (pytorch_model.bin) are "
            "not read, save them with save_pretrained(..., safe_serialization=True)"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        path = directory / shard
        if Path(shard).name != shard:
            raise UserError(f"{index}: shard {shard!r} is not a plain file name")
        if not path.exists():
            raise UserError(f"{path}: this shard is missing; {index.name} names it")
        for name, tensor in read_header(path, unread=buffers).items():
            if name in stored:
                raise UserError(f"{path}: tensor {name} is in {stored[name].path.name}, too")
            stored[name] = tensor
    for name, shard in weight_map.items():
        if name not in stored or stored[name].path.name != shard:
            raise UserError(f"{directory / str(shard)}: lacks tensor {name}, which {index.name} says is there")
    return stored


# ---- settings ------------------------------------------------------------------------------------------------------


def _check_architecture(config: Config, where: Path, family: Family, classifier: bool) -> None:
    architectures, custom = config.get("architectures") or [], config.get("auto_map") or {}
    if not classifier and _has_deepseek_layers(config, family):
        architectures = custom = []
    if classifier:
        if architectures != [family.classifier]:
            raise refuse(where, "architectures", architectures, f"a reward model is a {family.classifier}")
        labels = len(config["id2label"]) if isinstance(config.get("id2label"), dict) else config.get("num_labels", 2)
        if labels != 1:
            raise refuse(where, "num_labels", labels, "a reward is one number")
    elif not isinstance(architectures, list) or any(name not in family.classes for name in architectures):
        raise refuse(where, "architectures", architectures, f"a language model is one of {', '.join(family.classes)}")
    if custom and (not isinstance(custom, dict) or "AutoModelForCausalLM" in custom):
        raise refuse(where, "auto_map", custom, "code that comes with weights is not run")
    for key, neutral in _FOREIGN.items():
        value = config.get(key)
        if value is not None and value not in neutral:
            raise refuse(where, key, value, "models that use it are not reproduced exactly")


def _has_deepseek_layers(config: Config, family: Family) -> bool:
    """Whether it is what `export --to=hf-mtp` writes: `sequential` heads as further decoder layers. The class that it names is
    known here, so that its code need not run."""
    name = family.classes[0].replace("ForCausalLM", "MtpForCausalLM")
    classes = config.get("architectures"), config.get("auto_map")
    return classes == ([name], {"AutoModelForCausalLM": f"modeling_wmtp_mtp.{name}"})


def _check_settings(settings: ModelSettings, where: Path) -> None:
    s = settings
    if s.attention_heads % s.kv_heads:
        raise UserError(f"{where}: {s.attention_heads} attention heads can't share {s.kv_heads} key and value heads")
    if s.positions == "rope" and s.head_dim % 2:
        raise UserError(f"{where}: head_dim = {s.head_dim}: must be even for a rotary embedding")


def _llama(config: Config, where: Path) -> ModelSettings:
    heads = integer(config, "num_attention_heads", where)
    if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        raise refuse(where, "sliding_window", config["sliding_window"], "attention reads the whole prefix here")
    return _rope_family(
        config,
        where,
        default_positions=2048,
        kv_heads=heads if config.get("num_key_value_heads") is None else integer(config, "num_key_value_heads", where),
        head_dim=_derived_head_dim(config, where),
        qkv_bias=flag(config, "attention_bias", where, False),
        output_bias=flag(config, "attention_bias", where, False),
        mlp_bias=flag(config, "mlp_bias", where, False),
    )


def _qwen2(config: Config, where: Path) -> ModelSettings:
    _check_full_attention(config, where)
    head_dim = _derived_head_dim(config, where)
    return _rope_family(
        config,
        where,
        default_positions=32768,
        kv_heads=_qwen_kv_heads(config, where),
        head_dim=head_dim,
        qkv_bias=True,
    )


def _qwen3(config: Config, where: Path) -> ModelSettings:
    _check_full_attention(config, where)
    bias = flag(config, "attention_bias", where, False)
    return _rope_family(
        config,
        where,
        default_positions=32768,
        kv_heads=_qwen_kv_heads(config, where),
        head_dim=integer(config, "head_dim", where, 128),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


# Names that GPT-2's own may also go by; which one counts where both are there depends on their order.
_GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _gpt2(config: Config, where: Path) -> ModelSettings:
    for alias, key in _GPT2_ALIASES.items():
        if alias in config and config[alias] != config.get(key):
            raise refuse(where, alias, config[alias], f"{key} = {config.get(key)!r} is the same setting")
    width, heads = integer(config, "n_embd", where), integer(config, "n_head", where)
    if width % heads:
        raise UserError(f"{where}: n_embd = {width}: must be a multiple of n_head ({heads})")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise refuse(where, "activation_function", activation, "supported is gelu_new, GELU's tanh form")
    for key, needed in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if flag(config, key, where, needed) is not needed:
            raise refuse(where, key, config[key], f"supported is {needed}")
    return ModelSettings(
        vocabulary_size=integer(config, "vocab_size", where),
        width=width,
        layers=integer(config, "n_layer", where),
        attention_heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width if config.get("n_inner") is None else integer(config, "n_inner", where),
        max_positions=integer(config, "n_positions", where, 1024),
        num_heads=1,
        head_kind="linear",
        activation="gelu",
        norm="layernorm",
        norm_epsilon=number(config, "layer_norm_epsilon", where, 1e-5),
        positions="learned",
        qkv_bias=True,
        linear_bias=True,
        tie_embeddings=flag(config, "tie_word_embeddings", where, True),
        initial_scale=number(config, "initializer_range", where, 0.02),
    )


def _rope_family(config: Config, where: Path, *, default_positions: int, **settings: Any) -> ModelSettings:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise refuse(where, "hidden_act", activation, "supported is silu")
    max_positions = integer(config, "max_position_embeddings", where, default_positions)
    return ModelSettings(
        vocabulary_size=integer(config, "vocab_size", where),
        width=integer(config, "hidden_size", where),
        layers=integer(config, "num_hidden_layers", where),
        attention_heads=integer(config, "num_attention_heads", where),
        mlp_width=integer(config, "intermediate_size", where),
        max_positions=max_positions,
        num_heads=1,
        head_kind="linear",
        norm_epsilon=number(config, "rms_norm_eps", where, 1e-6),
        tie_embeddings=flag(config, "tie_word_embeddings", where, False),
        initial_scale=number(config, "initializer_range", where, 0.02),
        **_rope(config, where, max_positions),
        **settings,
    )


def _derived_head_dim(config: Config, where: Path) -> int:
    width, heads = integer(config, "hidden_size", where), integer(config, "num_attention_heads", where)
    if config.get("head_dim") is not None:
        return integer(config, "head_dim", where)
    if width % heads:
        raise UserError(f"{where}: hidden_size = {width}: must be a multiple of num_attention_heads ({heads})")
    return width // heads


def _qwen_kv_heads(config: Config, where: Path) -> int:
    if config.get("num_key_value_heads", 32) is None:
        return integer(config, "num_attention_heads", where)
    return integer(config, "num_key_value_heads", where, 32)


def _check_full_attention(config: Config, where: Path) -> None:
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise refuse(where, "layer_types", kinds, "supported is full_attention in every layer")
        return
    window = config.get("sliding_window", 4096) if flag(config, "use_sliding_window", where, False) else None
    whole = config.get("max_window_layers", 28)
    if window is not None and (type(whole) is not int or integer(config, "num_hidden_layers", where) > whole):
        raise refuse(where, "sliding_window", window, "attention reads the whole prefix here")


def _rope(config: Config, where: Path, max_positions: int) -> dict[str, Any]:
    """The rotary fields of `ModelSettings`, from `rope_parameters` or the older `rope_scaling` and `rope_theta`."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: rope_parameters = {given!r}: must be an object")
    if any(isinstance(value, dict) for value in given.values()):
        raise refuse(where, "rope_parameters", given, "one rotary embedding for all layers is")
    if given.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise refuse(where, "partial_rotary_factor", given["partial_rotary_factor"], "whole heads are rotated here")
    fields: dict[str, Any] = {
        "rope_theta": number(given if "rope_theta" in given else config, "rope_theta", where, 10_000.0)
    }
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3", "yarn"):
        raise refuse(where, "rope_type", kind, "supported are default, linear, llama3 and yarn")
    fields["rope_scaling"] = kind
    if kind == "linear":
        return fields | {"rope_factor": number(given, "factor", where)}
    positions = next(
        (source for source in (config, given) if "original_max_position_embeddings" in source),
        {"original_max_position_embeddings": max_positions},
    )
    original = integer(positions, "original_max_position_embeddings", where)
    fields["rope_original_positions"] = original
    if kind == "llama3":
        low, high = number(given, "low_freq_factor", where), number(given, "high_freq_factor", where)
        if low >= high:
            raise UserError(f"{where}: low_freq_factor = {low}: must be below high_freq_factor ({high})")
        return fields | {
            "rope_factor": number(given, "factor", where),
            "rope_low_frequency": low,
            "rope_high_frequency": high,
        }
    if "factor" in given and given["factor"] is None:
        factor = max_positions / original
    else:
        factor = number(given, "factor", where)
    return fields | {
        "rope_factor": factor,
        "rope_beta_fast": number(given, "beta_fast", where) if given.get("beta_fast") else 32.0,
        "rope_beta_slow": number(given, "beta_slow", where) if given.get("beta_slow") else 1.0,
        "rope_truncate": flag(given, "truncate", where, True),
        "rope_attention_factor": _yarn_attention_factor(given, factor, where),
    }


def _yarn_attention_factor(given: Config, factor: float, where: Path) -> float:
    if given.get("attention_factor") is not None:
        return number(given, "attention_factor", where)

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(number(given, "mscale", where)) / scale(number(given, "mscale_all_dim", where))
    return scale(1.0)


def _llama_like(settings: Callable[[Config, Path], ModelSettings], name: str) -> Family:
    return Family(
        settings=settings,
        classes=(f"{name}ForCausalLM", f"{name}Model"),
        classifier=f"{name}ForSequenceClassification",
        prefix="model.",
        layers="layers",
        layer=_LLAMA_LAYER,
        outer=_LLAMA_OUTER,
        transposed=True,
        buffers=r"\.rotary_emb\.inv_freq$",
    )


FAMILIES = {
    "llama": _llama_like(_llama, "Llama"),
    "qwen2": _llama_like(_qwen2, "Qwen2"),
    "qwen3": _llama_like(_qwen3, "Qwen3"),
    "gpt2": Family(
        settings=_gpt2,
        classes=("GPT2LMHeadModel", "GPT2Model"),
        classifier="GPT2ForSequenceClassification",
        prefix="transformer.",
        layers="h",
        layer=_GPT2_LAYER,
        outer=_GPT2_OUTER,
        transposed=False,
        buffers=r"\.attn\.(bias|masked_bias)$",
    ),
}
