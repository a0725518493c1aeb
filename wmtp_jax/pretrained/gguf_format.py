"""GGUF files of the llama family, dequantised to float32.

The header is parsed here, with every length checked against the file, because the `gguf` package's own reader loops without
end on some damaged files and takes seconds for a vocabulary; types, block sizes and dequantisation are the package's.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from wmtp_jax.errors import UserError
from wmtp_jax.pretrained.published import Published, Shape, check_counts, half_split, published_shapes
from wmtp_jax.pretrained.values import integer, number, refuse
from wmtp_jax.settings import ModelSettings

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

_OUTER = {"embedding": "token_embd.weight", "final_norm.scale": "output_norm.weight", "unembedding": "output.weight"}
_LAYER = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
# Keys of the architecture that `_settings` reads; any other changes the model in a way that we don't know.
_KNOWN = frozenset(
    "attention.head_count attention.head_count_kv attention.key_length attention.layer_norm_rms_epsilon "
    "attention.value_length block_count context_length embedding_length expert_count expert_used_count "
    "feed_forward_length rope.dimension_count rope.freq_base rope.scaling.factor rope.scaling.finetuned "
    "rope.scaling.original_context_length rope.scaling.type vocab_size".split()
)
# What chat models spell the end of a turn like.
_END_NAMES = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eom_id|> <EOT>".split()
)


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array among the metadata that is not read: only its length is known."""

    length: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    kind: GGMLQuantizationType
    shape: Shape  # slowest axis first
    offset: int  # from the start of the file
    size: int  # bytes


def open_file(path: Path) -> Published:
    """Reads the header of a GGUF file and checks that its tensors are those of the model that it describes.

    Raises:
      UserError: names the file and the key or tensor.
    """
    metadata, tensors = read_header(path)
    family = metadata.get("general.architecture")
    if family != "llama":
        raise refuse(path, "general.architecture", family, "the llama family is read from GGUF")
    if metadata.get("split.count", 1) not in (0, 1):
        raise refuse(path, "split.count", metadata["split.count"], "join the parts with llama-gguf-split --merge")
    settings = _settings(metadata, tensors, path)
    check_counts(settings, len(tensors), path)
    plan = {ours: (_stored_name(ours), shape) for ours, shape in published_shapes(settings).items()}
    for ours, (name, shape) in plan.items():
        stored = shape[::-1] if _transposed(ours) else shape
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing")
        if tensors[name].shape != stored:
            raise UserError(f"{path}: tensor {name} has shape {tensors[name].shape}, and the header asks for {stored}")
    left = tensors.keys() - {name for name, _ in plan.values()}
    if left:
        raise UserError(
            f"{path}: tensor {min(left)} ({len(left)} in all) is not part of a model that is reproduced here; rope_freqs "
            "stands for Llama 3.1's RoPE scaling: give the transformers directory instead"
            if "rope_freqs.weight" in left
            else f"{path}: tensor {min(left)} ({len(left)} in all) is not part of a llama model with the header's settings"
        )

    def read(ours: str) -> np.ndarray:
        array = _read_tensor(path, tensors[plan[ours][0]])
        if ".attention.query." in ours:
            array = half_split(array, settings.attention_heads)
        elif ".attention.key." in ours:
            array = half_split(array, settings.kv_heads)
        return array.T if _transposed(ours) else array

    scalars = {key: value for key, value in metadata.items() if not isinstance(value, _Array)}
    generation = {"eos_token_id": ends} if (ends := _end_tokens(metadata, path)) else None
    return Published(
        path, family, settings, read, "gguf", config=scalars, files=(path,), generation_config=generation
    )


def _end_tokens(metadata: dict[str, Any], path: Path) -> list[int]:
    """Ids of the tokens that end a text, a turn or a message. Older files do not name the second: llama.cpp then finds it, and
    more ends, by their usual spellings (`llama_vocab::impl::load` in src/llama-vocab.cpp)."""
    ends = []
    for key in ("eos", "eot", "eom"):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and (type(index) is not int or index < 0):
            raise UserError(f"{path}: tokenizer.ggml.{key}_token_id = {index!r}: must be a token id")
        if index is not None:
            ends.append(index)
    if "tokenizer.ggml.eot_token_id" not in metadata and isinstance(metadata.get("tokenizer.ggml.tokens"), _Array):
        tokens = read_header(path, arrays=True)[0]["tokenizer.ggml.tokens"]
        ends += [index for index, token in enumerate(tokens) if token in _END_NAMES]
    return list(dict.fromkeys(ends))


def _transposed(ours: str) -> bool:
    return ours == "unembedding" or ours.endswith(".kernel")


def _stored_name(ours: str) -> str:
    if ours in _OUTER:
        return _OUTER[ours]
    _, index, path = ours.split(".", 2)
    module, part = path.rsplit(".", 1)
    return f"blk.{index}.{_LAYER[module]}.{'bias' if part == 'bias' else 'weight'}"


def _settings(metadata: dict[str, Any], tensors: dict[str, _Tensor], path: Path) -> ModelSettings:
    given = {key: value for key, value in metadata.items() if key.startswith("llama.")}
    for key in sorted(given):
        if key.removeprefix("llama.") not in _KNOWN:
            raise refuse(path, key, given[key], "it is not known here")
    for key in ("llama.expert_count", "llama.expert_used_count"):
        if given.get(key, 0):
            raise refuse(path, key, given[key], "mixtures of experts are not")
    heads = integer(given, "llama.attention.head_count", path)
    width = integer(given, "llama.embedding_length", path)
    kv_heads = integer(given, "llama.attention.head_count_kv", path, heads)
    head_dim = integer(given, "llama.attention.key_length", path, max(width // heads, 1))
    if heads % kv_heads:
        raise UserError(f"{path}: {heads} attention heads can't share {kv_heads} key and value heads")
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if integer(given, key, path, head_dim) != head_dim:
            raise refuse(path, key, given[key], f"supported is the size of a head, {head_dim}")
    scaling = given.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise refuse(path, "llama.rope.scaling.type", scaling, "supported are none and linear")
    embedding = tensors.get(_OUTER["embedding"])
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path}: tensor {_OUTER['embedding']} is missing or not a matrix")
    vocabulary = embedding.shape[0]
    tokens = metadata.get("tokenizer.ggml.tokens", _Array(vocabulary))
    if integer(given, "llama.vocab_size", path, vocabulary) != vocabulary or tokens != _Array(vocabulary):
        raise UserError(
            f"{path}: tensor {embedding.name} has {vocabulary} rows, llama.vocab_size is "
            f"{given.get('llama.vocab_size', 'absent')}, and the tokenizer has {getattr(tokens, 'length', tokens)} tokens"
        )
    return ModelSettings(
        vocabulary_size=vocabulary,
        width=width,
        layers=integer(given, "llama.block_count", path),
        attention_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=integer(given, "llama.feed_forward_length", path),
        max_positions=integer(given, "llama.context_length", path),
        num_heads=1,
        head_kind="linear",
        norm_epsilon=number(given, "llama.attention.layer_norm_rms_epsilon", path),
        rope_theta=number(given, "llama.rope.freq_base", path, 10_000.0),
        rope_scaling=scaling,
        rope_factor=1.0 if scaling == "none" else number(given, "llama.rope.scaling.factor", path),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        tie_embeddings=_OUTER["unembedding"] not in tensors,
    )


def _read_tensor(path: Path, tensor: _Tensor) -> np.ndarray:
    try:
        with path.open("rb") as file:
            file.seek(tensor.offset)
            raw = np.fromfile(file, dtype=np.uint8, count=tensor.size)
    except OSError as error:
        raise UserError(f"{path}: tensor {tensor.name} can't be read: {error.strerror}") from error
    if raw.size != tensor.size:
        raise UserError(f"{path}: ends within tensor {tensor.name}; it changed while it was read")
    rows = math.prod(tensor.shape[:-1])
    try:
        return dequantize(raw.reshape(rows, -1), tensor.kind).reshape(tensor.shape)
    except NotImplementedError as error:
        raise refuse(path, tensor.name, tensor.kind.name, "the gguf package can't dequantise this type") from error


# ---- the header ----------------------------------------------------------------------------------------------------


class _Header:
    """A cursor over the file's bytes that never leaves them."""

    def __init__(self, path: Path, data: mmap.mmap, arrays: bool):
        self.path, self.data, self.arrays, self.position = path, data, arrays, 0

    def broken(self, what: str) -> UserError:
        return UserError(f"{self.path}: truncated or not a GGUF file: {what}")

    def skip(self, count: int) -> int:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise self.broken(f"the header goes on past its {len(self.data)} bytes")
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.broken(f"the name at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.broken(f"unknown metadata type {kind} at byte {self.position}")
        item, length = self.scalar("<I"), self.scalar("<Q")
        if self.arrays and item in (_STRING, *_SCALARS):
            return [self.value(item) for _ in range(min(length, len(self.data)))]
        if item in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[item]))
        elif item == _STRING:
            for _ in range(length):
                self.skip(self.scalar("<Q"))
        else:
            raise self.broken(f"an array of metadata type {item} at byte {self.position}")
        return _Array(length)


def read_header(path: Path, *, arrays: bool = False) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The metadata and the tensors of a GGUF file; `arrays`: with the metadata's arrays, as lists (a vocabulary takes 0.1 s).

    Raises:
      UserError: the file can't be read, or is damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Header(path, data, arrays))
    except ValueError as error:  # an empty file can't be mapped
        raise UserError(f"{path}: is empty") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def _parse(header: _Header) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    path, size = header.path, len(header.data)
    if header.data[:4] != b"GGUF":
        raise UserError(f"{path}: not a GGUF file (a transformers model is given as a directory)")
    header.skip(4)
    version = header.scalar("<I")
    if version not in (2, 3):
        raise refuse(path, "GGUF version", version, "supported are little-endian versions 2 and 3")
    count, pairs = header.scalar("<Q"), header.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = header.string()
        metadata[key] = header.value(header.scalar("<I"))
    described = []
    for _ in range(count):
        name, rank = header.string(), header.scalar("<I")
        if rank > 4:
            raise header.broken(f"tensor {name} has {rank} axes")
        shape = tuple(header.scalar("<Q") for _ in range(rank))[::-1]
        described.append((name, shape, header.scalar("<I"), header.scalar("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.broken(f"general.alignment = {alignment!r}")
    start = -(-header.position // alignment) * alignment
    tensors: dict[str, _Tensor] = {}
    end = start
    for name, shape, code, offset in sorted(described, key=lambda tensor: tensor[3]):
        if code not in set(GGMLQuantizationType):
            raise refuse(path, f"type of tensor {name}", code, "unknown to the gguf package")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(code)]
        if not shape or 0 in shape or shape[-1] % block:
            raise header.broken(f"tensor {name} of shape {shape} in blocks of {block}")
        length = math.prod(shape) // block * block_bytes
        if name in tensors or start + offset < end or start + offset + length > size:
            raise header.broken(f"tensor {name} overlaps another or ends past the file's {size} bytes")
        tensors[name] = _Tensor(name, GGMLQuantizationType(code), shape, start + offset, length)
        end = start + offset + length
    return metadata, tensors
