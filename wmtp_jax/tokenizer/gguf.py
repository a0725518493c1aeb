"""The tokenizer in a GGUF file, as the files of a `transformers` tokenizer.

How text is cut before the byte-pair merges is a name there (`tokenizer.ggml.pre`), whose meaning llama.cpp's source holds; the
converter of `transformers` cuts as GPT-2 does whatever the name, which gives other ids for digits. So a name that is not
known here is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from wmtp_jax.errors import UserError
from wmtp_jax.pretrained.gguf_format import read_header
from wmtp_jax.pretrained.values import refuse

# As the tokenizers that Meta and Hugging Face publish write it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` of the tokenizer in a GGUF file.

    Raises:
      UserError: none is there, or one of a kind that is not reproduced.
    """
    return files_of(read_header(path, arrays=True)[0], path)


def files_of(metadata: dict[str, Any], path: Path) -> dict[str, bytes]:
    """The same for metadata that are read already, by GGUF's keys; `path` is for messages."""
    tokens, kinds = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{path}: holds no tokenizer (tokenizer.ggml.tokens); name one in config.data.tokenizer")
    if kinds is None:
        kinds = [1] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.token_type: must be a list of {len(tokens)}, one for each token")
    model = metadata.get("tokenizer.ggml.model")
    match model:
        case "gpt2":
            tokenizer = _byte_level(metadata, tokens, path)
        case "llama":
            tokenizer = _sentencepiece(metadata, tokens, kinds, path)
        case _:
            raise refuse(path, "tokenizer.ggml.model", model, "supported are gpt2 and llama")
    added = [
        tokenizers.AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    if tokenizer.get_vocab_size() != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens: {len(tokens)} tokens, some of them twice")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in _SPECIAL.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                raise UserError(f"{path}: tokenizer.ggml.{key}_token_id = {index!r}: there are {len(tokens)} tokens")
            config[name] = tokens[index]
    # llama.cpp's rule where the file says nothing.
    usual = model == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    if metadata.get("tokenizer.ggml.add_bos_token", usual) and "bos_token" in config:
        token = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", "$B:1"], special_tokens=[(token, tokens.index(token))]
        )
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def _byte_level(metadata: dict[str, Any], tokens: list[str], path: Path) -> tokenizers.Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) and m.count(" ") == 1 for m in merges):
        raise UserError(f"{path}: tokenizer.ggml.merges is missing or not a list of pairs")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    known = metadata.get("tokenizer.ggml.pre")
    match known:
        case "gpt-2":
            first, ignore_merges = [], False
        case "smollm" | "starcoder":
            first, ignore_merges = [pre_tokenizers.Digits(individual_digits=True)], False
        case _ if known in _LLAMA3_NAMES:
            first, ignore_merges = [pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated")], True
        case _:
            raise refuse(path, "tokenizer.ggml.pre", known, "supported are gpt-2, smollm, starcoder and llama-bpe")
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises nothing narrower, for a merge of unknown tokens
        raise UserError(f"{path}: tokenizer.ggml.merges: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not ignore_merges)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_of]) if first else bytes_of
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], kinds: list[int], path: Path) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of all neighbours whose union is a piece, that of the highest score is merged first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.scores is missing, or not one for each of {len(tokens)} tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    parts = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
