"""A model with `block` heads in the layout of Meta's multi-token prediction release; see `meta_format.py`, which reads it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.export.whole import Lazy, Whole
from wmtp_jax.pretrained.meta_format import LAYER, OUTER

META_FILE = "consolidated.pth"


def check_meta(whole: Whole) -> None:
    """Refuses what the release's code does not compute.

    Raises:
      UserError: names what can't be expressed.
    """
    s = whole.settings
    if s.num_heads > 1 and s.head_kind != "block":
        raise UserError(
            f"{whole.path}: --to=meta: Meta's layout holds block heads (a layer each), and the model has {s.head_kind} ones; "
            "--to=hf writes any kind"
        )
    kinds = {name: getattr(s, name) for name in ("activation", "norm", "positions")}
    refusals = {
        f"{', '.join(f'{k} = {v}' for k, v in kinds.items())}; it is a Llama (swiglu, rmsnorm, rope)": (
            tuple(kinds.values()) != ("swiglu", "rmsnorm", "rope")
        ),
        "norms of queries and keys (qk_norm, Qwen3)": s.qk_norm,
        "biases (Qwen2, attention_bias, mlp_bias)": s.qkv_bias or s.output_bias or s.mlp_bias or s.linear_bias,
        f"a stretched rotary embedding (rope_scaling = {s.rope_scaling})": s.rope_scaling != "none",
        f"attention heads of another width than dim / n_heads ({s.head_dim})": s.head_dim * s.attention_heads != s.width,
    }
    for reason, applies in refusals.items():
        if applies:
            raise UserError(f"{whole.path}: --to=meta: Meta's layout has no {reason}; --to=hf writes any model")


def meta_tensors(whole: Whole) -> dict[str, Lazy]:
    """Every tensor by Meta's name; tied embeddings are there twice."""
    s = whole.settings
    tensors = {stored: whole.lazy(ours) for ours, stored in OUTER.items() if ours != "unembedding"}
    tied = s.tie_embeddings
    tensors[OUTER["unembedding"]] = whole.lazy("embedding") if tied else whole.lazy("unembedding", transposed=True)
    stacks = {f"layers.{i}": f"layers.{i}" for i in range(s.layers)}
    stacks |= {f"heads.{k}": f"extra_heads.{k - 1}" for k in whole.extra_heads}
    for ours, theirs in stacks.items():
        for path, stored in LAYER.items():
            shape, make = whole.lazy(f"{ours}.{path}", transposed=path.endswith(".kernel"))
            heads = {"attention.query.kernel": s.attention_heads, "attention.key.kernel": s.kv_heads}.get(path)
            if heads is not None:
                make = functools.partial(_neighbours, make, heads)
            tensors[f"{theirs}.{stored}"] = shape, make
    return tensors


def write_checkpoint(whole: Whole, tensors: Mapping[str, Lazy], directory: Path) -> None:
    """Writes `params.json` and `consolidated.pth`. Needs torch, which takes all tensors at once."""
    import torch

    arrays = {name: torch.from_numpy(np.array(make(), order="C")) for name, (_, make) in tensors.items()}
    torch.save(arrays, directory / META_FILE)
    (directory / "params.json").write_text(json.dumps(_params(whole), indent=2) + "\n")


def _params(whole: Whole) -> dict[str, Any]:
    s = whole.settings
    params = {
        "dim": s.width,
        "n_layers": s.layers + s.num_heads - 1,
        "n_heads": s.attention_heads,
        "n_kv_heads": s.kv_heads,
        "vocab_size": s.vocabulary_size,
        "norm_eps": s.norm_epsilon,
        "n_future_tokens": s.num_heads,
        **_feed_forward(s.width, s.mlp_width),
    }
    # The release's own code has Llama 2's 10,000; other values are Code Llama's key.
    return params if s.rope_theta == 10_000.0 else params | {"rope_theta": s.rope_theta}


def _feed_forward(width: int, mlp_width: int) -> dict[str, Any]:
    """Meta's constants for a feed-forward width F: int(m int(8 D / 3)), rounded up to a multiple of `multiple_of`."""
    plain = int(2 * 4 * width / 3)
    if 256 * -(-plain // 256) == mlp_width:
        return {"multiple_of": 256}
    # Whatever lies in 1 .. F rounds up to F.
    smaller = {} if plain <= mlp_width else {"ffn_dim_multiplier": mlp_width / plain}
    return {"multiple_of": mlp_width, **smaller}


def _neighbours(make: Callable[[], np.ndarray], heads: int) -> np.ndarray:
    """Rows `[heads * C, ...]` whose rotary pairs are (i, i + C / 2), put in Meta's order, pairs (2 i, 2 i + 1)."""
    rows = make()
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
