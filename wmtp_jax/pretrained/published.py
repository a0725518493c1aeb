"""Published weights in our names: what a format reader hands over, and the new heads that an old trunk gets.

A name is a parameter's path, with the index written out where the model stacks: `embedding`,
`layers.3.attention.query.kernel`, `heads.0.mlp.up.kernel`. Kernels are `[in, out]`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.settings import ModelSettings
from wmtp_jax.storage.long_work import LongWork

Shape = tuple[int, ...]
SEQUENTIAL_NORMS = ("embedding_norm", "hidden_norm", "output_norm")


@dataclasses.dataclass(frozen=True)
class Published:
    """Weights that were opened and found complete; no tensor has been read yet.

    Attributes:
      path: the directory or file.
      family: the architecture in its publisher's word (`llama`, `qwen2`, ...).
      settings: of the model as it was published: one `linear` head, or its own `block` heads.
      read: our name -> float32 array, read from the file at each call; it may be a transposed view. The trunk's last
        layer counts as `layers.{L-1}`, extra `block` heads as `heads.1` and on.
      format: transformers | gguf | meta.
      config: what the publisher says of the model: `config.json`, `params.json`, or the scalars of a GGUF file's metadata.
      files: all that the model is made of.
      generation_config: what the publisher says of generation (`generation_config.json`, or the same made of a GGUF file's
        metadata); None where nothing is said.
      revision: the commit of a hub snapshot, "" for a local path.
    """

    path: Path
    family: str
    settings: ModelSettings
    read: Callable[[str], np.ndarray]
    format: str
    config: dict[str, Any]
    files: tuple[Path, ...]
    generation_config: dict[str, Any] | None = None
    revision: str = ""

    @functools.cached_property
    def key(self) -> str:
        """A hash of every byte of the files: 0.1 s for 145 MB."""
        digest = hashlib.blake2b(digest_size=16)
        with LongWork(f"hashing {self.path}", total=len(self.files), unit="files") as work:
            for path in self.files:
                try:
                    with path.open("rb") as file:
                        digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
                except OSError as error:
                    raise UserError(f"{path}: can't be read: {error.strerror}") from error
                work.done += 1
        return digest.hexdigest()


def layer_shapes(settings: ModelSettings) -> dict[str, Shape]:
    """Shapes of one layer's parameters, by their path in the layer."""
    s = settings
    inner, inner_kv = s.attention_heads * s.head_dim, s.kv_heads * s.head_dim
    shapes: dict[str, Shape] = {}

    def norm(name: str, size: int, kind: str) -> None:
        shapes[f"{name}.scale"] = (size,)
        if kind == "layernorm":
            shapes[f"{name}.bias"] = (size,)

    def projection(name: str, size_in: int, size_out: int, bias: bool) -> None:
        shapes[f"{name}.kernel"] = (size_in, size_out)
        if bias:
            shapes[f"{name}.bias"] = (size_out,)

    norm("attention_norm", s.width, s.norm)
    projection("attention.query", s.width, inner, s.qkv_bias or s.linear_bias)
    projection("attention.key", s.width, inner_kv, s.qkv_bias or s.linear_bias)
    projection("attention.value", s.width, inner_kv, s.qkv_bias or s.linear_bias)
    projection("attention.output", inner, s.width, s.output_bias or s.linear_bias)
    if s.qk_norm:
        norm("attention.query_norm", s.head_dim, "rmsnorm")
        norm("attention.key_norm", s.head_dim, "rmsnorm")
    norm("mlp_norm", s.width, s.norm)
    if s.activation == "swiglu":
        projection("mlp.gate", s.width, s.mlp_width, s.mlp_bias or s.linear_bias)
    projection("mlp.up", s.width, s.mlp_width, s.mlp_bias or s.linear_bias)
    projection("mlp.down", s.mlp_width, s.width, s.mlp_bias or s.linear_bias)
    return shapes


def outer_shapes(settings: ModelSettings) -> dict[str, Shape]:
    """Shapes of the parameters around the layers: embeddings, final norm, unembedding."""
    s = settings
    shapes: dict[str, Shape] = {"embedding": (s.vocabulary_size, s.width)}
    if s.positions == "learned":
        shapes["position_embedding"] = (s.max_positions, s.width)
    shapes["final_norm.scale"] = (s.width,)
    if s.norm == "layernorm":
        shapes["final_norm.bias"] = (s.width,)
    if not s.tie_embeddings:
        shapes["unembedding"] = (s.width, s.vocabulary_size)
    return shapes


def head_shapes(settings: ModelSettings) -> dict[str, Shape]:
    """Shapes of the parameters of one head after head 0, by their path in the head; a `linear` head is one array, path ""."""
    s, layer = settings, layer_shapes(settings)
    match s.head_kind:
        case "linear":
            return {"": (s.width, s.vocabulary_size)}
        case "block":
            return layer
    parts = ("scale", "bias") if s.norm == "layernorm" else ("scale",)
    norms = {f"{norm}.{part}": (s.width,) for norm in SEQUENTIAL_NORMS for part in parts}
    return {"project.kernel": (2 * s.width, s.width), **norms, **{f"layer.{name}": shape for name, shape in layer.items()}}


def published_shapes(settings: ModelSettings) -> dict[str, Shape]:
    """Every name that `Published.read` must know for these settings, with the shape that it gives."""
    shapes = outer_shapes(settings)
    for i in range(settings.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer_shapes(settings).items()}
    for k in range(1, settings.num_heads):
        shapes |= {f"heads.{k}.{name}".rstrip("."): shape for name, shape in head_shapes(settings).items()}
    return shapes


def check_counts(settings: ModelSettings, tensors: int, where: Path) -> None:
    """Refuses layers or heads that outnumber the stored tensors, before a list of their names is made.

    Raises:
      UserError: names the numbers.
    """
    if settings.layers + settings.num_heads - 1 > tensors:
        raise UserError(
            f"{where}: asks for {settings.layers} layers and {settings.num_heads} heads, and the weights hold {tensors} "
            "tensors in all"
        )


def with_heads(settings: ModelSettings, *, num_heads: int, head_kind: str, where: Path) -> ModelSettings:
    """The settings of the published model with the heads asked for.

    Raises:
      UserError: the weights have trained heads of another kind or fewer of them, and more than one is asked for.
    """
    if num_heads < 1:
        raise UserError(f"num_heads = {num_heads}: must be at least 1")
    if head_kind not in ("linear", "block", "sequential"):
        raise UserError(f"head_kind = {head_kind!r}: must be linear, block or sequential")
    trained, kind = settings.num_heads, settings.head_kind
    if trained > 1 and num_heads > 1 and (head_kind != kind or num_heads > trained):
        raise UserError(
            f"{where}: has {trained} trained {kind} heads, not {num_heads} {head_kind} ones; ask for "
            f"{kind} heads, at most {trained} of them, or for one head"
        )
    return dataclasses.replace(settings, num_heads=num_heads, head_kind=head_kind)


def parameters(
    published: Published, *, num_heads: int = 1, head_kind: str = "linear"
) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of the model with `num_heads` heads, one tensor at a time, float32; layer by layer within a parameter.

    New heads start from the trunk, and head 0 is the published model: `linear` heads from the unembedding, `block` heads
    from the last layer, `sequential` heads from the last layer with a projection [0; I] that passes the hidden state on,
    and from the final norm; so each depth is "the last layer once more". Heads that came with the weights are what they are.
    """
    for name, make in tensors(published, num_heads=num_heads, head_kind=head_kind):
        yield name, make()


def tensors(
    published: Published, *, num_heads: int = 1, head_kind: str = "linear"
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """`parameters` before they are read: each name with the function that reads or makes its tensor, for any thread."""
    s = with_heads(published.settings, num_heads=num_heads, head_kind=head_kind, where=published.path)
    last = s.layers - 1
    trained = published.settings.num_heads > 1

    def read(name: str) -> Callable[[], np.ndarray]:
        return functools.partial(published.read, name)

    for name in outer_shapes(s):
        if name != "unembedding":
            yield name, read(name)
    unembedding = (lambda: published.read("embedding").T) if s.tie_embeddings else read("unembedding")
    if not s.tie_embeddings:
        yield "unembedding", unembedding
    if head_kind == "linear":
        yield from ((f"heads.{k}", read(f"heads.{k + 1}") if trained else unembedding) for k in range(num_heads - 1))
    for name in layer_shapes(s):
        for i in range(s.layers - (head_kind == "block")):
            yield f"layers.{i}.{name}", read(f"layers.{i}.{name}")
    match head_kind:
        case "block":
            for name in layer_shapes(s):
                for k in range(num_heads):
                    source = f"heads.{k}" if k and trained else f"layers.{last}"
                    yield f"heads.{k}.{name}", read(f"{source}.{name}")
        case "sequential" if num_heads > 1 and trained:
            for name in head_shapes(s):
                for k in range(num_heads - 1):
                    yield f"heads.{k}.{name}", read(f"heads.{k + 1}.{name}")
        case "sequential" if num_heads > 1:
            depths = range(num_heads - 1)
            for name in layer_shapes(s):
                for k in depths:
                    yield f"heads.{k}.layer.{name}", read(f"layers.{last}.{name}")
            pass_on = np.concatenate([np.zeros((s.width, s.width), np.float32), np.eye(s.width, dtype=np.float32)])
            for k in depths:
                yield f"heads.{k}.project.kernel", lambda: pass_on
            for part in ("scale", "bias") if s.norm == "layernorm" else ("scale",):
                neutral = np.full(s.width, part == "scale", np.float32)
                for norm in ("embedding_norm", "hidden_norm"):
                    for k in depths:
                        yield f"heads.{k}.{norm}.{part}", lambda neutral=neutral: neutral
                for k in depths:
                    yield f"heads.{k}.output_norm.{part}", read(f"final_norm.{part}")


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[heads * C, ...]` whose rotary pairs are (2 i, 2 i + 1), put in our order, pairs (i, i + C / 2)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
