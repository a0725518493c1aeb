"""The SentencePiece tokenizer of Meta's releases (`tokenizer.model`), as the files of a `transformers` tokenizer.

The file is a protocol buffer, which the description in `transformers` reads; what is made of it is made as for GGUF, which holds
the same pieces, scores and kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.pretrained.values import refuse
from wmtp_jax.tokenizer.gguf import files_of

FILE = "tokenizer.model"
_BPE = 2  # of trainer_spec.model_type


def find_model(directory: Path) -> Path | None:
    """`tokenizer.model` of one of Meta's checkpoints: beside `params.json`, or, as in the release, a folder above."""
    if not (directory / "params.json").exists():
        return None
    return next((path for path in (directory / FILE, directory.absolute().parent / FILE) if path.is_file()), None)


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json` and the file itself.

    Raises:
      UserError: it is damaged, or of a kind that is not reproduced.
    """
    # Imported late: only Meta's releases need it.
    from google.protobuf.message import DecodeError
    from transformers.utils import sentencepiece_model_pb2_new as description

    model = description.ModelProto()
    try:
        content = path.read_bytes()
        model.ParseFromString(content)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    except DecodeError as error:
        raise UserError(f"{path}: truncated or not a SentencePiece model") from error
    if not model.pieces:
        raise UserError(f"{path}: truncated or not a SentencePiece model: it has no pieces")
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    for key, value, needed in (
        ("model_type", trainer.model_type, _BPE),
        ("byte_fallback", trainer.byte_fallback, True),
        ("precompiled_charsmap", bool(normalizer.precompiled_charsmap), False),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
    ):
        if value != needed:
            raise refuse(path, key, value, f"supported is {needed}, as in Llama 2's tokenizer")
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        "tokenizer.ggml.add_space_prefix": normalizer.add_dummy_prefix,
    }
    for name, theirs in (("bos", "bos_id"), ("eos", "eos_id"), ("unknown", "unk_id"), ("padding", "pad_id")):
        if getattr(trainer, theirs) >= 0:  # -1: there is none
            metadata[f"tokenizer.ggml.{name}_token_id"] = getattr(trainer, theirs)
    return files_of(metadata, path) | {FILE: content}
