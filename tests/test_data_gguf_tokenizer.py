"""The tokenizer in a GGUF file: its ids are those of the tokenizer that the file was written from."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import pre_tokenizers
from transformers.utils import sentencepiece_model_pb2_new as description

from wmtp_jax.errors import UserError
from wmtp_jax.tokenizer.tokenizer import load_tokenizer


def write_gguf_tokenizer(path: Path, **fields) -> Path:
    """A GGUF file with nothing but a tokenizer: lists become arrays."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        match value:
            case list():
                writer.add_array(key, value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case _:
                writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TEXTS = [
    "def f(x12345):\n    return x + 1.5  # h\u00e9 <|end|>\n\n\n        y",
    "it's 2024, I'LL  go\t\r\n\r\n\u4f60\u597d \U0001f600",
    " a",
    "",
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")],
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_byte_level_tokenizer_in_a_gguf_file(cut, tmp_path):
    """The ids of the tokenizer that the file was written from, on text with digits, contractions and special spellings."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut != "llama-bpe")
    backend.pre_tokenizer = pre_tokenizers.Sequence([*CUTS[cut], bytes_of])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    backend.train_from_iterator([*TEXTS, *(path.read_text() for path in Path(__file__).parent.glob("test_data_*.py"))], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    path = write_gguf_tokenizer(
        tmp_path / "t.gguf", model="gpt2", pre=cut, tokens=tokens, token_type=[3] + [1] * (len(tokens) - 1),
        merges=[" ".join(pair) for pair in model["merges"]], eos_token_id=0,
    )  # fmt: skip
    tokenizer = load_tokenizer(path)
    backend.encode_special_tokens = True
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocabulary_size, tokenizer.end_of_text_id) == (len(tokens), 0)
    assert tokenizer.begin_of_text_id is None, "no bos is named"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("fields", "begin"),
    [
        ({"pre": "gpt-2"}, None),
        ({"pre": "gpt-2", "add_bos_token": True}, 1),
        ({"pre": "llama-bpe"}, 1),  # as llama.cpp does where the file says nothing
        ({"pre": "llama-bpe", "add_bos_token": False}, None),
    ],
)
def test_what_begins_a_text_in_a_gguf_file(fields, begin, tmp_path):
    tokens = ["<|end|>", "<|begin|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    path = write_gguf_tokenizer(
        tmp_path / "t.gguf", model="gpt2", tokens=[*tokens, "he"], token_type=[3, 3] + [1] * 257, merges=["h e"],
        eos_token_id=0, bos_token_id=1, **fields,
    )  # fmt: skip
    tokenizer = load_tokenizer(path)
    assert tokenizer.begin_of_text_id == begin
    assert tokenizer.begin(tokenizer.encode("he")).tolist() == ([] if begin is None else [begin]) + [258]


def write_sentencepiece(path: Path, tokens: list[str], scores: list[float], kinds: list[int], **changes) -> Path:
    """`tokenizer.model` as Llama 2's is set up."""
    model = description.ModelProto()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    settings = {"model_type": 2, "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1,
                "remove_extra_whitespaces": False, "add_dummy_prefix": True, "escape_whitespaces": True}  # fmt: skip
    for name, value in (settings | changes).items():
        spec = model.trainer_spec if name in description.TrainerSpec.DESCRIPTOR.fields_by_name else model.normalizer_spec
        setattr(spec, name, value)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("where", ["gguf", "meta", "above"])
def test_a_sentencepiece_tokenizer(where, tmp_path):
    """In a GGUF file, beside Meta's params.json, or a folder above. Against literal SentencePiece BPE: merge the neighbours whose
    union has the highest score, until none is a piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = "_ t h e a n d th the _t _th _the an and _a _and he en".replace("_", "\u2581").split()
    tokens = pieces + words
    scores = [0.0] * len(pieces) + [-float(i) for i in (40, 41, 42, 43, 44, 45, 46, 2, 3, 1, 0, 4, 6, 8, 5, 7, 9, 10)]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    path = tmp_path / "checkpoint"
    if where == "gguf":
        path = write_gguf_tokenizer(
            tmp_path / "t.gguf", model="llama", tokens=tokens, token_type=kinds, scores=scores, eos_token_id=2
        )
    else:
        path.mkdir()
        (path / "params.json").write_text("{}")
        write_sentencepiece((path if where == "meta" else tmp_path) / "tokenizer.model", tokens, scores, kinds)
    tokenizer = load_tokenizer(path)
    assert tokenizer.begin_of_text_id == (None if where == "gguf" else 1), "Llama 2's begins a text with <s>"
    rank = dict(zip(tokens, scores, strict=True))

    def literal(text: str) -> list[int]:
        parts = list("\u2581" + text.replace(" ", "\u2581"))
        while True:
            unions = [(rank[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in rank]
            if not unions:
                break
            at = -max(unions)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids = []
        for part in parts:
            ids += [tokens.index(part)] if part in rank else [tokens.index(f"<0x{b:02X}>") for b in part.encode()]
        return ids

    for text in ("the and then", "and the hen", "a\u00e9b", "  the"):
        assert tokenizer.encode(text).tolist() == literal(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_sentencepiece_model_that_is_not_reproduced_is_refused(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    given = ["<unk>", "a", "b"], [0.0, -1.0, -2.0], [2, 1, 1]
    wrong = {"model_type": 1, "byte_fallback": False, "precompiled_charsmap": b"x", "remove_extra_whitespaces": True}
    for change in ({key: value} for key, value in wrong.items()):
        path = write_sentencepiece(tmp_path / "tokenizer.model", *given, **change)
        with pytest.raises(UserError, match=next(iter(change))):
            load_tokenizer(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="SentencePiece"):
        load_tokenizer(tmp_path)


def test_a_gguf_tokenizer_that_is_not_reproduced_is_refused(tmp_path):
    good = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "eos_token_id": 0}
    cases = [
        ({"pre": "chatglm-bpe"}, "tokenizer.ggml.pre = 'chatglm-bpe'"),
        ({"model": "bert"}, "tokenizer.ggml.model = 'bert'"),
        ({"merges": ["a c"]}, "tokenizer.ggml.merges"),
        ({"eos_token_id": 7}, "eos_token_id = 7"),
        ({"token_type": [1, 1]}, "token_type"),
        ({"model": "llama"}, "tokenizer.ggml.scores"),
        ({}, "loses text"),
    ]
    for number, (change, words) in enumerate(cases):
        path = write_gguf_tokenizer(tmp_path / f"{number}.gguf", **good | change)
        with pytest.raises(UserError) as caught:
            load_tokenizer(path)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(write_gguf_tokenizer(tmp_path / "none.gguf", model="gpt2"))
