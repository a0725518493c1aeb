"""Tokenizer directories as people publish them, with settings beside tokenizer.json: ids are those of `AutoTokenizer`."""

import json

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from wmtp_jax.errors import UserError
from wmtp_jax.tokenizer import load_tokenizer

TRAINED_ON = [
    "def area(width, height):\n    return width * height\n",
    "plain words <|im_start|>user and more words\n",
] * 5
TEXTS = [
    "def area(x):\n    return 12345",
    " leading and  two spaces\n",
    "<|im_start|>user\nplain words<|im_end|>\n<|im_start|>assistant\n",
    "a <tool> b<tool>c <tool>  </s> <|endoftext|>x",
    "naïve café 日本語 🎉",
    "",
]
EXAMPLES = 60
CHATML = ("<|im_start|>", "<|im_end|>")


def byte_level(names):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TRAINED_ON, trainer)
    return json.loads(backend.to_str())


def sentencepiece(names):
    """The layout of Llama 2."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(fallback)
    names = ["<unk>", "<s>", "</s>", *names]
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=[*names, *every_byte], show_progress=False)
    backend.train_from_iterator(TRAINED_ON, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(names)]
    return spec


def unigram():
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.UnigramTrainer(vocab_size=330, special_tokens=names, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TRAINED_ON, trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"], spec["model"]["byte_fallback"] = spec["added_tokens"][:2], True
    return spec


BYTE_LEVEL, SENTENCEPIECE, UNIGRAM = byte_level(["<|endoftext|>"]), sentencepiece([]), unigram()
WITH_CHATML = byte_level(["<|endoftext|>", *CHATML])
CLASSES = ["PreTrainedTokenizerFast", "TokenizersBackend", "SomeTokenizer", None]
OWN_CLASSES = {
    id(SENTENCEPIECE): ["LlamaTokenizer", "LlamaTokenizerFast"],
    id(UNIGRAM): ["PreTrainedTokenizerFast"],
}


def entry(content, *, special, **flags):
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return plain | {"content": content, "special": special} | flags


@st.composite
def directories(draw):
    """Files by name, of a tokenizer whose tokens and class are told in one of many ways."""
    spec = draw(st.sampled_from([BYTE_LEVEL, WITH_CHATML, SENTENCEPIECE, UNIGRAM]))
    eos = "<|endoftext|>" if spec in (BYTE_LEVEL, WITH_CHATML) else "</s>"
    size = len(spec["model"]["vocab"])
    own = OWN_CLASSES.get(id(spec), ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
    kind = draw(st.sampled_from([*CLASSES, *own]))
    config = {"eos_token": eos} if kind is None else {"tokenizer_class": kind, "eos_token": eos}
    files = {"tokenizer.json": spec}
    if kind is not None and kind.startswith(("GPT2", "Llama")) and draw(st.booleans()):
        config["add_prefix_space"] = draw(st.booleans())
    if draw(st.booleans()):
        config |= {"add_bos_token": True, "bos_token": eos}
    tokens = [
        entry("<|im_start|>", special=True),
        entry("<|im_end|>", special=True),
        entry(
            "<tool>",
            special=False,
            **{flag: draw(st.booleans()) for flag in ("lstrip", "rstrip", "normalized", "single_word")},
        ),
    ]
    match draw(st.sampled_from(["nowhere", "decoder", "added_tokens.json", "map", "additional", "extra"])):
        case "decoder":
            config["added_tokens_decoder"] = {str(size + place): token for place, token in enumerate(tokens)}
        case "added_tokens.json":
            files["added_tokens.json"] = {token["content"]: size + place for place, token in enumerate(tokens)}
            config["additional_special_tokens"] = list(CHATML)
        case "map":
            files["special_tokens_map.json"] = {"eos_token": eos, "additional_special_tokens": list(CHATML)}
            del config["eos_token"]
        case "additional":
            config["additional_special_tokens"] = list(CHATML)
        case "extra":
            config["extra_special_tokens"] = list(CHATML)
    # Another model's class would make nonsense of a SentencePiece vocabulary.
    fitting = {id(SENTENCEPIECE): [None, "llama"], id(UNIGRAM): [None]}
    model = draw(st.sampled_from(fitting.get(id(spec), [None, "llama", "gpt2", "qwen2", "qwen3", "starcoder2"])))
    if model is not None:
        files["config.json"] = {"model_type": model} | ({"tokenizer_class": own[0]} if draw(st.booleans()) else {})
    return files | {"tokenizer_config.json": config}


def written(directory, files):
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=directories())
def test_ids_are_those_of_transformers(files, tmp_path_factory):
    directory = written(tmp_path_factory.mktemp("tokenizers") / "one", files)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer(directory)
    assert ours.end_of_text_id == theirs.eos_token_id
    ours.save(directory.parent / "saved")
    again = load_tokenizer(directory.parent / "saved")
    assert again.fingerprint == ours.fingerprint
    reloaded = transformers.AutoTokenizer.from_pretrained(directory.parent / "saved")
    for text in TEXTS:
        # What a document spells stays text; what a chat template spells is meant.
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        meant = theirs(text, add_special_tokens=False, split_special_tokens=False).input_ids
        for tokenizer in (ours, again):
            assert tokenizer.encode(text).tolist() == plain
            assert tokenizer.begin(tokenizer.encode(text)).tolist() == theirs(text, split_special_tokens=True).input_ids
            assert tokenizer.encode_batch([text], special_tokens=True)[0].tolist() == meant
        assert reloaded(text, add_special_tokens=False, split_special_tokens=False).input_ids == meant


def no_question(monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "n")
    return asked


def test_code_that_comes_with_a_tokenizer_is_not_run_and_nothing_is_asked(tmp_path, monkeypatch):
    asked = no_question(monkeypatch)
    code = {"tokenization_own.py": "raise SystemExit('was run')\n"}
    config = {"tokenizer_class": "OwnTokenizer", "eos_token": "<|endoftext|>"}
    config["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    model = {"model_type": "own", "auto_map": {"AutoConfig": "tokenization_own.OwnConfig"}}
    files = code | {"tokenizer_config.json": config, "config.json": model}
    complete = written(tmp_path / "complete", files | {"tokenizer.json": BYTE_LEVEL})
    plain = written(
        tmp_path / "plain", {"tokenizer.json": BYTE_LEVEL, "tokenizer_config.json": {"eos_token": "<|endoftext|>"}}
    )
    tokenizer = load_tokenizer(complete)
    assert tokenizer.encode(TEXTS[0]).tolist() == load_tokenizer(plain).encode(TEXTS[0]).tolist()
    tokenizer.save(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    with pytest.raises(UserError, match="auto_map of tokenizer_config.json names code, which is not run") as error:
        load_tokenizer(written(tmp_path / "code", files | {"own.model": "x"}))
    assert "\n" not in str(error.value) and not asked


def test_tokens_that_no_file_holds_get_no_ids(tmp_path):
    """GPT-2's class names an unknown token of its own, which `transformers` puts past the rows of the model."""
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<0>"}
    spec = byte_level(["<0>"])
    tokenizer = load_tokenizer(written(tmp_path / "one", {"tokenizer.json": spec, "tokenizer_config.json": config}))
    assert (tokenizer.vocabulary_size, tokenizer.end_of_text_id) == (len(spec["model"]["vocab"]), 0)
    config["eos_token"] = "<nowhere>"
    with pytest.raises(UserError, match="names eos_token '<nowhere>', which tokenizer.json does not have"):
        load_tokenizer(written(tmp_path / "two", {"tokenizer.json": spec, "tokenizer_config.json": config}))
