"""Checkpoints of Meta's multi-token prediction release (arXiv 2404.19737): `params.json` beside `consolidated.pth`.

`layers.*` are the trunk and, last, the layer of head 0; `extra_heads.*` the layers of the heads after it; norm and
unembedding are shared. Rotary pairs are (2 i, 2 i + 1), as in Meta's Llama code.
"""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.pretrained.published import Published, half_split, published_shapes
from wmtp_jax.pretrained.values import integer, number, read_json, refuse
from wmtp_jax.settings import ModelSettings

OUTER = {"embedding": "tok_embeddings.weight", "final_norm.scale": "norm.weight", "unembedding": "output.weight"}
LAYER = {
    "attention_norm.scale": "attention_norm.weight",
    "attention.query.kernel": "attention.wq.weight",
    "attention.key.kernel": "attention.wk.weight",
    "attention.value.kernel": "attention.wv.weight",
    "attention.output.kernel": "attention.wo.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    "mlp.gate.kernel": "feed_forward.w1.weight",
    "mlp.up.kernel": "feed_forward.w3.weight",
    "mlp.down.kernel": "feed_forward.w2.weight",
}
# multiple_of and ffn_dim_multiplier give the width of the feed-forward part, which the tensors show; the limits on batch
# and length belong to Meta's cache.
_KNOWN = frozenset(
    "dim n_layers n_heads n_kv_heads vocab_size norm_eps rope_theta n_future_tokens multiple_of ffn_dim_multiplier "
    "max_batch_size max_seq_len use_scaled_rope".split()
)

# What torch's reader raises on a file with some bytes changed; the pickle module documents no list either.
_DAMAGED = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, ImportError, struct.error)


def open_checkpoint(directory: Path) -> Published:
    """Opens a checkpoint directory; a pickle that holds anything but tensors is refused, never run. Needs torch.

    Raises:
      UserError: names the file and the key or tensor.
    """
    where, weights = directory / "params.json", directory / "consolidated.pth"
    params = read_json(where)
    tensors = _load(weights)
    settings = _settings(params, tensors, where, weights)
    plan = {ours: (_stored_name(ours, settings), shape) for ours, shape in published_shapes(settings).items()}
    for ours, (name, shape) in plan.items():
        stored = shape[::-1] if _transposed(ours) else shape
        if name not in tensors:
            raise UserError(f"{weights}: tensor {name} is missing")
        if tuple(tensors[name].shape) != stored:
            raise UserError(
                f"{weights}: tensor {name} has shape {tuple(tensors[name].shape)}, {where.name} asks for {stored}"
            )
    left = tensors.keys() - {name for name, _ in plan.values()} - {"rope.freqs"}
    if left:
        raise UserError(f"{weights}: tensor {min(left)} ({len(left)} in all) is not part of the model in {where.name}")

    def read(ours: str) -> np.ndarray:
        array = tensors[plan[ours][0]].float().numpy()
        if ".attention.query." in ours:
            array = half_split(array, settings.attention_heads)
        elif ".attention.key." in ours:
            array = half_split(array, settings.kv_heads)
        return array.T if _transposed(ours) else array

    return Published(directory, "meta-mtp", settings, read, format="meta", config=params, files=(where, weights))


def _transposed(ours: str) -> bool:
    return ours == "unembedding" or ours.endswith(".kernel")


def _stored_name(ours: str, settings: ModelSettings) -> str:
    if ours in OUTER:
        return OUTER[ours]
    stack, index, path = ours.split(".", 2)
    prefix = f"layers.{index}" if stack == "layers" else f"extra_heads.{int(index) - 1}"
    return f"{prefix}.{LAYER[path]}"


def _settings(params: dict[str, Any], tensors: dict[str, Any], where: Path, weights: Path) -> ModelSettings:
    for key in sorted(params.keys() - _KNOWN):
        raise refuse(where, key, params[key], "it is not known here")
    if params.get("use_scaled_rope"):
        raise refuse(where, "use_scaled_rope", params["use_scaled_rope"], "its constants are not in the checkpoint")
    layers, extra = _count(tensors, "layers"), _count(tensors, "extra_heads")
    future, in_all = integer(params, "n_future_tokens", where, 1), integer(params, "n_layers", where)
    if future != extra + 1 or in_all != layers + extra:
        raise UserError(
            f"{weights}: has {layers} layers and {extra} extra heads, and {where.name} asks for n_layers = {in_all} in all, "
            f"n_future_tokens = {future}"
        )
    width, heads = integer(params, "dim", where), integer(params, "n_heads", where)
    kv_heads = heads if params.get("n_kv_heads") is None else integer(params, "n_kv_heads", where)
    if width % heads or width // heads % 2 or heads % kv_heads:
        raise UserError(f"{where}: dim = {width}, n_heads = {heads} and n_kv_heads = {kv_heads} do not go together")
    # Meta's releases leave -1 where the tokenizer decides.
    vocabulary = _rows(tensors, OUTER["embedding"], weights)
    if params.get("vocab_size", -1) not in (-1, vocabulary):
        raise UserError(
            f"{weights}: {OUTER['embedding']} has {vocabulary} rows, {where.name} says vocab_size = {params['vocab_size']}"
        )
    return ModelSettings(
        vocabulary_size=vocabulary,
        width=width,
        layers=layers,
        attention_heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=_rows(tensors, "layers.0.feed_forward.w1.weight", weights),
        max_positions=integer(params, "max_seq_len", where, 4096),
        num_heads=future,
        head_kind="block",
        norm_epsilon=number(params, "norm_eps", where, 1e-5),
        rope_theta=number(params, "rope_theta", where, 10_000.0),
    )


def _count(tensors: dict[str, Any], stack: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(rf"{stack}\.(\d+)\.", name))})


def _rows(tensors: dict[str, Any], name: str, weights: Path) -> int:
    if name not in tensors or tensors[name].ndim != 2:
        raise UserError(f"{weights}: tensor {name} is missing or not a matrix")
    return tensors[name].shape[0]


def _load(weights: Path) -> dict[str, Any]:
    # Imported late: no other format needs torch.
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(f"{weights}: reading it needs torch; install wmtp[torch]") from error
    if not weights.exists():
        raise UserError(f"{weights}: no such file")
    try:
        tensors = torch.load(weights, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{weights}: holds more than tensors, and code from weights is never run") from error
    except _DAMAGED as error:
        what = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{weights}: truncated or not a checkpoint of torch.save: {what}") from error
    if not isinstance(tensors, dict) or any(
        not isinstance(name, str) or not isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{weights}: must hold a dict of tensors by name")
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta:
            raise refuse(weights, f"layout of tensor {name}", str(tensor.layout), "supported are dense tensors with their values")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise refuse(
                weights, f"type of tensor {name}", str(tensor.dtype), "supported are float32, float16, bfloat16"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}  # parameters are fine, too
