"""Published weights in our parameters. Opening and reading them needs no jax; placing them on devices does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_jax.errors import UserError
from wmtp_jax.pretrained.gguf_format import open_file
from wmtp_jax.pretrained.locating import locate
from wmtp_jax.pretrained.meta_format import open_checkpoint
from wmtp_jax.pretrained.published import Published, parameters
from wmtp_jax.pretrained.transformers_format import open_directory

if TYPE_CHECKING:
    from wmtp_jax.model import Model

__all__ = ["Published", "load_pretrained", "open_pretrained", "open_reward_model", "parameters"]


def open_pretrained(path: str | Path) -> Published:
    """Opens published weights and checks that they are whole and that we reproduce their model exactly.

    Args:
      path: a `transformers` directory (or a hub name, `owner/name` or `owner/name@revision`), a GGUF file (or `package:NAME`, the
        one in an installed package), or a directory of Meta's multi-token-prediction release.

    Raises:
      UserError: one line that names the file and what is wrong.
    """
    where, revision = locate(path)
    if where.is_file():
        opened = open_file(where)
    elif (where / "config.json").exists():
        opened = open_directory(where)
    elif (where / "params.json").exists():
        opened = open_checkpoint(where)
    else:
        raise UserError(f"{where}: holds no model: neither config.json (transformers) nor params.json (Meta) is here")
    return dataclasses.replace(opened, revision=revision)


def open_reward_model(path: str | Path) -> Published:
    """Opens a `*ForSequenceClassification` with one label; see `transformers_format.open_directory`.

    Raises:
      UserError: one line that names the file and what is wrong.
    """
    where, revision = locate(path)
    return dataclasses.replace(open_directory(where, classifier=True), revision=revision)


def load_pretrained(
    path: str | Path, *, num_heads: int = 1, head_kind: str = "linear", dtype: str = "float32"
) -> Model:
    """A model with published weights; `logits(tokens)` maps int `[B, S]` to float32 `[B, S, H, V]`.

    Head 0 is the published model; the other heads start from it (`published.parameters` says how), or are the published
    ones where the weights come with `block` heads.

    Args:
      path: as for `open_pretrained`.
      num_heads: H.
      head_kind: linear | block | sequential.
      dtype: float32 | bfloat16, the type of activations and products; parameters are float32.

    Raises:
      UserError: one line that names the file and what is wrong.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}: must be float32 or bfloat16")
    opened = open_pretrained(path)
    # Imported late, so that the torch backend can read weights where jax is missing.
    from wmtp_jax.pretrained.placing import place

    return place(opened, num_heads=num_heads, head_kind=head_kind, dtype=dtype)
