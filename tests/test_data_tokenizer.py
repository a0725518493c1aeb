import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from wmtp_jax.errors import UserError
from wmtp_jax.tokenizer import tokenizer as module
from wmtp_jax.tokenizer.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe

TEXTS = [
    "def area(width, height):\n    return width * height\n\n\nclass Box:\n    pass\n",
    "# naïve café 日本語 🎉 \u2581 \x00\x7f\u00ad\ttabs\r\n   trailing   ",
    f"a {END_OF_TEXT} inside a document, and again{END_OF_TEXT}",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS * 5, vocabulary_size=320)


def published(directory, spec, **config):
    """A directory as a model's authors publish it."""
    directory.mkdir()
    (directory / "tokenizer.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
    for name, content in config.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def llama_like(directory):
    """The layout of Llama 2: SentencePiece spelling, a space before each text, bytes as a last resort."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(fallback)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=names, show_progress=False)
    backend.train_from_iterator([TEXTS[0], "plain words " * 9], trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    return published(directory, spec, tokenizer_config={"eos_token": {"content": "</s>"}})


def test_round_trip_and_bytes_of_every_token(bpe):
    for text, ids in zip(TEXTS, bpe.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int32 and bpe.decode(ids) == text
        assert bpe.token_bytes[ids].sum() == len(text.encode())
        assert b"".join(bpe.pieces[i] for i in ids) == text.encode()
    assert bpe.token_bytes.shape == (bpe.vocabulary_size,) and bpe.token_bytes.dtype == np.int32
    assert bpe.end_of_text_id == 0 and bpe.token_bytes[0] == 0 and (bpe.token_bytes[1:] > 0).all()


def test_a_special_token_spelled_in_a_document_stays_text(bpe, tmp_path):
    for tokenizer in (bpe, load_tokenizer(llama_like(tmp_path / "llama"))):
        for text in (f"x{END_OF_TEXT}y", "x</s>y", "<s>"):
            assert tokenizer.end_of_text_id not in tokenizer.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_the_same_in_another_process_with_other_threads(bpe):
    program = "from wmtp_jax.tokenizer.tokenizer import train_bpe\n"
    program += f"print(train_bpe({TEXTS!r} * 5, vocabulary_size=320).fingerprint)"
    for threads in ("1", "3"):
        environment = {"RAYON_NUM_THREADS": threads, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == bpe.fingerprint


def test_a_saved_tokenizer_is_the_same_and_transformers_reads_it(bpe, tmp_path):
    bpe.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == bpe.fingerprint and loaded.end_of_text_id == 0
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == 0 and theirs(TEXTS[0]).input_ids == bpe.encode(TEXTS[0]).tolist()
    assert train_bpe(TEXTS, vocabulary_size=300).fingerprint != bpe.fingerprint


def test_files_that_only_transformers_reads(bpe, tmp_path):
    bpe.save(tmp_path / "ours")
    spec = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(spec["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, spec["merges"])) + "\n")
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    loaded = load_tokenizer(old)
    assert loaded.end_of_text_id == 0
    for text in TEXTS:
        np.testing.assert_array_equal(loaded.encode(text), bpe.encode(text))


def test_sentencepiece_spelling_counts_bytes_and_the_space_before_a_text(tmp_path):
    tokenizer = load_tokenizer(llama_like(tmp_path / "llama"))
    assert tokenizer.end_of_text_id == 2
    for text in ["plain words", "café 🎉 <0x41>", "two  spaces\n and\tmore"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + 1
        assert tokenizer.pieces[ids[0]].startswith(b" ")


def unigram(directory, *, fallback):
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if fallback)]
    trainer = trainers.UnigramTrainer(vocab_size=320, special_tokens=names, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(["some plain words"] * 3, trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"], spec["model"]["byte_fallback"] = spec["added_tokens"][:2], fallback
    return published(directory, spec, config={"eos_token_id": [1]})


def test_unigram_with_metaspace(tmp_path):
    tokenizer = load_tokenizer(unigram(tmp_path / "t5", fallback=True))
    assert tokenizer.end_of_text_id == 1
    for text in ("plain words some", "plain café 日本語 🎉"):
        assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(f" {text}".encode())


def test_a_vocabulary_that_loses_text_is_refused(tmp_path, bpe):
    bpe.save(tmp_path / "ours")
    lossy = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    kept = {token: index for token, index in lossy["model"]["vocab"].items() if token != "Ã"}  # byte 0xC3, of é
    lossy["model"]["vocab"], lossy["model"]["merges"] = kept, []
    llama = json.loads((llama_like(tmp_path / "llama") / "tokenizer.json").read_text())
    llama["model"]["byte_fallback"] = False
    eos = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    for directory, reason in [
        (unigram(tmp_path / "t5", fallback=False), "no byte fallback"),
        (published(tmp_path / "bytes", lossy, tokenizer_config=eos | {"eos_token": END_OF_TEXT}), "for the byte 0xC3"),
        (published(tmp_path / "sentences", llama, tokenizer_config=eos), "no byte fallback"),
    ]:
        with pytest.raises(UserError, match=f"{directory}: the tokenizer loses text .*{reason}"):
            load_tokenizer(directory)


def test_a_rare_character_that_a_vocabulary_can_not_spell_is_refused_where_a_text_has_it(tmp_path, bpe):
    """As the published vocabulary of SmolLM2, which has no token for the bytes 0x04 and 0xF3, among others."""
    bpe.save(tmp_path / "ours")
    spec = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    spec["model"]["vocab"] = {token: index for token, index in spec["model"]["vocab"].items() if token not in (chr(256 + 4), "ó")}
    eos = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    tokenizer = load_tokenizer(published(tmp_path / "published", spec, tokenizer_config=eos))
    assert tokenizer.decode(tokenizer.encode("def f():\n\treturn 1")) == "def f():\n\treturn 1"
    with pytest.raises(UserError, match=r"no token for the character U\+0004"):
        tokenizer.encode("a\x04b")
    with pytest.raises(UserError, match=r"no token for the character U\+E0041"):
        tokenizer.encode_batch(["fine", "\U000e0041"])


def test_a_stored_length_limit_does_not_cut_documents(bpe, tmp_path):
    bpe.save(tmp_path / "ours")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "ours" / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    limited = published(tmp_path / "limited", backend.to_str(), tokenizer_config={"eos_token": END_OF_TEXT})
    np.testing.assert_array_equal(load_tokenizer(limited).encode(TEXTS[0]), bpe.encode(TEXTS[0]))


def test_long_texts_are_encoded_in_parts_with_the_same_tokens(bpe, monkeypatch):
    text = "".join(f"def f{n}(x):\n    return x + {n}\n\n\nx = {n}\ny = x\n" for n in range(200))
    whole = bpe.encode(text)
    monkeypatch.setattr(module, "_PART_CHARACTERS", 500)
    assert len(module._split(text, 500)) > 10
    np.testing.assert_array_equal(bpe.encode(text), whole)
    monkeypatch.setattr(module, "_CHARACTERS_AT_ONCE", 1100)
    assert list(map(bpe.decode, bpe.encode_batch([text, "", *TEXTS]))) == [text, "", *TEXTS]
    unbroken = "x" * 1203
    assert bpe.decode(bpe.encode(unbroken)) == unbroken and bpe.encode("").size == 0


def test_saving_leaves_a_models_own_configuration_alone(bpe, tmp_path):
    bpe.save(tmp_path / "ours")
    spec = (tmp_path / "ours" / "tokenizer.json").read_text()
    gpt2 = published(tmp_path / "gpt2", spec, config={"eos_token_id": 0}, tokenizer_config={"model_max_length": 9})
    load_tokenizer(gpt2).save(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(tmp_path / "again").end_of_text_id == 0


def test_what_is_no_tokenizer(bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path / "ours")
    spec = (tmp_path / "ours" / "tokenizer.json").read_text()
    wordpiece = json.loads(spec) | {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None}
    damaged = published(tmp_path / "damaged", spec)
    (damaged / "tokenizer_config.json").write_bytes(b'{"eos_token": "\xff"}')
    cases = {
        "tokenizer.json is not JSON": published(tmp_path / "cut", spec[: len(spec) // 2]),
        "no end-of-text token; add": published(tmp_path / "endless", spec),
        "eos_token '</s>', which": published(tmp_path / "odd", spec, tokenizer_config={"eos_token": "</s>"}),
        "eos_token_id 999, which": published(tmp_path / "high", spec, config={"eos_token_id": 999}),
        "tokenizer_config.json: eos_token = 5: must": published(tmp_path / "number", spec, tokenizer_config={"eos_token": 5}),
        "eos_token_id 'x', which": published(tmp_path / "text", spec, config={"eos_token_id": "x"}),
        "eos_token_id [], which": published(tmp_path / "none", spec, config={"eos_token_id": []}),
        "tokenizer_config.json is not JSON": damaged,
        "config.json must hold a JSON object": published(tmp_path / "list", spec, config=[1]),
        "neither a byte-level nor a SentencePiece": published(tmp_path / "words", wordpiece),
        "transformers finds no tokenizer there": Path(tmp_path),
        "/no/such/directory: no such directory": "/no/such/directory",
    }
    for message, where in cases.items():
        with pytest.raises(UserError) as caught:
            load_tokenizer(where)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="vocabulary_size = 256: must be at least 257"):
        train_bpe(TEXTS, vocabulary_size=256)


def test_a_hub_name_without_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="config.data.tokenizer = 'nobody/nothing-here': no such directory here, "):
        load_tokenizer("nobody/nothing-here")
