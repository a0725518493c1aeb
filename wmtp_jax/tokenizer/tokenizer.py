"""Text to token ids: a byte-level BPE trained on the corpus, or any fast `transformers` tokenizer."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from wmtp_jax.errors import UserError
from wmtp_jax.storage import hub, s3
from wmtp_jax.tokenizer import sentencepiece
from wmtp_jax.tokenizer.gguf import tokenizer_files
from wmtp_jax.tokenizer.settings import folded, json_object, special_token, to_json

END_OF_TEXT = "<|endoftext|>"
MIN_BPE_VOCABULARY = 257  # every byte and the end of text

# What a directory may hold that makes a tokenizer or says which of its tokens ends a text; config.json for GPT-2, whose
# tokenizer files don't name it.
_MODEL_FILES = ("config.json", "generation_config.json")
_FILE_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
    *_MODEL_FILES,
)  # fmt: skip
# Text takes about 130 times its size while it is encoded, so that it goes in by so many characters at a time, and a
# longer text in parts, one a core.
_CHARACTERS_AT_ONCE = 1 << 21
_PART_CHARACTERS = 1 << 18


class Part(NamedTuple):
    """A piece of a document's text.

    Attributes:
      target: whether its tokens may be targets.
      template: whether it was written by a chat template, so that special tokens spelled in it are meant. Everywhere else
        text stays text, whatever it spells.
    """

    text: str
    target: bool
    template: bool = False


class Tokenizer:
    """A vocabulary and how text is cut into it. Texts never become special tokens, whatever they spell, unless asked to.

    Attributes:
      vocabulary_size: V, one more than the highest token id.
      end_of_text_id: the token that ends every document.
      begin_of_text_id: the token that `transformers` puts before every text; None where there is none.
      fingerprint: a hash of what determines token ids; equal fingerprints give equal ids.
    """

    def __init__(self, files: dict[str, bytes], where: str):
        """Reads a tokenizer from the contents of its files.

        Args:
          files: contents by name; `tokenizer.json`, and what names the end-of-text token.
          where: the directory or hub name, for messages.

        Raises:
          UserError: no `tokenizer.json`, a damaged one, no end-of-text token, or a kind that loses text.
        """
        if "tokenizer.json" not in files:
            raise UserError(f"{where}: no tokenizer.json there, nor files that transformers makes one from")
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises nothing narrower, whatever is wrong with the file
            raise UserError(f"{where}: tokenizer.json can't be read: {error}") from error
        self._backend.encode_special_tokens = True
        # A stored length limit would cut documents short without a word.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._spec = json.loads(files["tokenizer.json"])
        self._spelling = _spelling(self._spec, where)
        self._unspelled = _unspelled_bytes(self._spec, self._spelling, self._backend, where)
        self.vocabulary_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text_id = _end_of_text_id(files, self._backend, where)
        self.begin_of_text_id = _begin_of_text_id(self._backend, where)
        self._files = _without_model_files(files, self._backend.id_to_token(self.end_of_text_id), where)
        self.fingerprint = self._fingerprint()

    def encode_batch(
        self, texts: Sequence[str], *, continued: bool = False, special_tokens: bool = False
    ) -> list[np.ndarray]:
        """Token ids int32 `[n]` of each text, on all cores; neither end-of-text nor other special tokens are added.

        Args:
          continued: the texts go on where another one ended: no space goes before them where the tokenizer puts one
            before each text (SentencePiece).
          special_tokens: special tokens that a text spells become their ids, as a chat template means them.

        Raises:
          UserError: a text holds a control character that the vocabulary can't spell.
        """
        backend = self._continuing_backend if continued else self._backend
        backend.encode_special_tokens = not special_tokens
        owners, parts = [], []
        for owner, text in enumerate(texts):
            self._check_spelled(text)
            split = _split(text, _PART_CHARACTERS)
            owners += [owner] * len(split)
            parts += split
        arrays: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(list(map(len, parts)), _CHARACTERS_AT_ONCE):
            encodings = backend.encode_batch_fast(parts[group], add_special_tokens=False)
            for owner, encoding in zip(owners[group], encodings, strict=True):
                arrays[owner].append(np.array(encoding.ids, np.int32))
        return [np.concatenate(pieces) if len(pieces) > 1 else pieces[0] for pieces in arrays]

    def _check_spelled(self, text: str) -> None:
        if not self._unspelled:
            return
        spelled = text.encode("utf-8", "surrogatepass")
        if len(spelled.translate(None, self._unspelled)) < len(spelled):
            lost = next(c for c in text if set(c.encode("utf-8", "surrogatepass")) & set(self._unspelled))
            raise UserError(
                f"the tokenizer has no token for the character U+{ord(lost):04X}, which a text holds: it would be lost; take it "
                "out of the text, or name another tokenizer"
            )

    def encode_parts(self, documents: Sequence[Sequence[Part]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids int32 `[n]` and whether each may be a target, bool `[n]`, of documents in parts.

        Each part is cut into tokens by itself, so that none belongs to two.
        """
        kinds: dict[tuple[bool, bool], list[tuple[int, int]]] = {}
        for number, parts in enumerate(documents):
            for place, part in enumerate(parts):
                # After a special token a text begins anew.
                begins = place == 0 or (part.template and part.text.startswith(self.special_tokens))
                kinds.setdefault((not begins, part.template), []).append((number, place))
        encoded: dict[tuple[int, int], np.ndarray] = {}
        for (continued, template), places in kinds.items():
            texts = [documents[number][place].text for number, place in places]
            found = self.encode_batch(texts, continued=continued, special_tokens=template)
            encoded.update(zip(places, found, strict=True))
        result = []
        for number, parts in enumerate(documents):
            ids = [encoded[number, place] for place in range(len(parts))]
            allowed = [np.full(len(found), part.target) for found, part in zip(ids, parts, strict=True)]
            result.append((np.concatenate(ids), np.concatenate(allowed)))
        return result

    def begin(self, ids: np.ndarray) -> np.ndarray:
        """The ids of a text, int32 `[n]`, after the token that begins one; unless they have it, as from a chat template."""
        if self.begin_of_text_id is None or (len(ids) and ids[0] == self.begin_of_text_id):
            return ids
        return np.concatenate([np.array([self.begin_of_text_id], np.int32), ids])

    def with_begin(self, rule: str, *, key: str) -> Tokenizer:
        """The same tokenizer with another rule for what begins a text, here and in `transformers` once it is saved.

        Args:
          rule: auto (as it is) | never | always (its `bos_token`).
          key: what a message begins with.

        Raises:
          UserError: always, and it has no such token.
        """
        begin = None if rule == "never" else self.begin_of_text_id
        if rule == "always" and begin is None and (begin := self.special_token_id("bos_token")) is None:
            raise UserError(f"{key} = {rule!r}: the tokenizer names no bos_token; set it to 'auto', or name another tokenizer")
        if begin == self.begin_of_text_id:
            return self
        before = [] if begin is None else [self._backend.id_to_token(begin)]
        template = tokenizers.processors.TemplateProcessing(
            single=[*before, "$A"], pair=[*before, "$A", "$B:1"], special_tokens=[(token, begin) for token in before]
        )
        backend = tokenizers.Tokenizer.from_str(json.dumps(self._spec))
        backend.post_processor = template
        return Tokenizer(self._files | {"tokenizer.json": backend.to_str().encode()}, key)

    def encode(self, text: str) -> np.ndarray:
        """Token ids int32 `[n]` of one text."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """What the special tokens are spelled like."""
        return tuple(token.content for token in self._backend.get_added_tokens_decoder().values() if token.special)

    def special_token_id(self, name: str) -> int | None:
        """The id of what `tokenizer_config.json` names as `bos_token`, `pad_token` and so on; None where it names none."""
        where = "tokenizer_config.json"
        token = special_token(json_object(self._files, where, "the tokenizer"), name, where)
        return None if token is None else self._backend.token_to_id(token)

    @functools.cached_property
    def chat_template_hash(self) -> str:
        """Of the files that may hold a chat template."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            if name.startswith("chat_template") or name == "tokenizer_config.json":
                digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()

    @functools.cached_property
    def _continuing_backend(self) -> tokenizers.Tokenizer:
        """The same vocabulary without the space before each text."""
        spec = json.loads(json.dumps(self._spec))
        spec["truncation"] = spec["padding"] = None
        changed = False
        for key in ("normalizer", "pre_tokenizer"):
            for part in _parts_of(spec.get(key)):
                match part["type"]:
                    case "Prepend":
                        part["prepend"], changed = "", True
                    case "Metaspace":
                        part["prepend_scheme"], changed = "never", True
                    case "ByteLevel" if part["add_prefix_space"]:
                        part["add_prefix_space"], changed = False, True
        return tokenizers.Tokenizer.from_str(json.dumps(spec)) if changed else self._backend

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """`[V]`: the bytes that every token stands for; b"" for special tokens and ids without a token."""
        pieces = [b""] * self.vocabulary_size
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            pieces[index] = _bytes_of(token, self._spelling)
        for index, token in self._backend.get_added_tokens_decoder().items():
            pieces[index] = b"" if token.special else token.content.encode()
        return pieces

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for: b"" also past the last id, where models pad their vocabulary and may sample."""
        return self.pieces[token] if token < self.vocabulary_size else b""

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 `[V]`: how many UTF-8 bytes every token stands for, 0 for special tokens.

        Over a text's tokens they sum to the bytes of the text, after the tokenizer's own normalisation: one more where
        it puts a space before each text (SentencePiece). That is on a document's first token, which is never a target.
        """
        return np.array([len(piece) for piece in self.pieces], np.int32)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `load_tokenizer` and `transformers.AutoTokenizer` read."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(directory) / name).write_bytes(content)

    def _fingerprint(self) -> str:
        model = dict(self._spec["model"])
        if "merges" in model:  # written as pairs or as "a b", by version
            model["merges"] = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
        decisive = [model, *(self._spec.get(key) for key in ("normalizer", "pre_tokenizer", "added_tokens"))]
        begin = [] if self.begin_of_text_id is None else [self.begin_of_text_id]
        text = json.dumps([decisive, self.end_of_text_id, *begin], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_tokenizer(name: str | os.PathLike) -> Tokenizer:
    """A tokenizer from a directory (`tokenizer.json`, or whatever `transformers.AutoTokenizer` reads), a GGUF file, Meta's
    release (SentencePiece, beside `params.json` or a folder above) or a hub name.

    Raises:
      UserError: neither a directory, a file nor a hub repository within reach, or files that make no tokenizer.
    """
    name = str(s3.local(name)) if s3.is_remote(name) else os.path.expanduser(name)
    if os.path.isfile(name):
        return Tokenizer(folded(tokenizer_files(Path(name)), name), name)
    directory = Path(name) if os.path.isdir(name) else _download(name)
    files = _read_files(directory)
    if "tokenizer.json" not in files and (model := sentencepiece.find_model(directory)):
        files = files | sentencepiece.tokenizer_files(model)
    return Tokenizer(folded(files, name), name)


def train_bpe(texts: Iterable[str], *, vocabulary_size: int) -> Tokenizer:
    """Trains a byte-level BPE (Radford et al., 2019); the same texts in the same order give the same tokenizer.

    Args:
      texts: what to count pairs in.
      vocabulary_size: V, at least 257; few texts give fewer. `<|endoftext|>` has id 0, the 256 bytes follow.

    Raises:
      UserError: a vocabulary that has no room for every byte.
    """
    if vocabulary_size < MIN_BPE_VOCABULARY:
        raise UserError(f"config.data.vocabulary_size = {vocabulary_size}: must be at least {MIN_BPE_VOCABULARY}")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return Tokenizer(files, "the trained bpe")


def _read_files(directory: Path) -> dict[str, bytes]:
    paths = {path for pattern in _FILE_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(paths)}


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name}: no such directory, to read a tokenizer from")
    return hub.snapshot(name, _FILE_PATTERNS, told=f"config.data.tokenizer = {name!r}")


def _end_of_text_id(files: dict[str, bytes], backend: tokenizers.Tokenizer, where: str) -> int:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = special_token(json_object(files, name, where), "eos_token", f"{where}: {name}")
        if token is not None:
            index = backend.token_to_id(token)
            if index is None:
                raise UserError(f"{where}: {name} names eos_token {token!r}, which tokenizer.json does not have")
            return index
    for name in ("generation_config.json", "config.json"):
        index = json_object(files, name, where).get("eos_token_id")
        if isinstance(index, list) and index:
            index = index[0]
        if index is not None:
            if type(index) is not int or not 0 <= index < 1 << 31 or backend.id_to_token(index) is None:
                raise UserError(f"{where}: {name} names eos_token_id {index!r}, which tokenizer.json does not have")
            return index
    raise UserError(f'{where}: no end-of-text token; add "eos_token" to its tokenizer_config.json')


def _begin_of_text_id(backend: tokenizers.Tokenizer, where: str) -> int | None:
    """What the post-processor puts before a text."""
    plain, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    if not starts or starts[0] > 1:
        raise UserError(f"{where}: the post_processor of tokenizer.json puts {whole} for {plain}: one token may begin a text")
    return whole[0] if starts[0] else None


def _without_model_files(files: dict[str, bytes], end_of_text: str, where: str) -> dict[str, bytes]:
    """The tokenizer's own files, complete without the model's configuration, which is not ours to save."""
    config = json_object(files, "tokenizer_config.json", where)
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if config.setdefault("eos_token", end_of_text) is None:
        config["eos_token"] = end_of_text
    own = {name: content for name, content in files.items() if name not in _MODEL_FILES}
    return own | {"tokenizer_config.json": to_json(config)}


def _parts_of(component: dict | None) -> Iterator[dict]:
    """A normalizer, pre-tokenizer or decoder and, where it is a sequence, its members."""
    if component is None:
        return
    yield component
    for key in ("pretokenizers", "normalizers", "decoders"):
        for member in component.get(key) or ():
            yield from _parts_of(member)


def _spelling(spec: dict, where: str) -> str:
    """How tokens spell bytes: "bytes" (GPT-2's alphabet of one character a byte) or "sentencepiece"."""
    parts = [p for key in ("normalizer", "pre_tokenizer", "decoder") for p in _parts_of(spec.get(key))]
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return "bytes"
    if "Metaspace" in kinds or any(p["type"] == "Replace" and p["content"] == "▁" for p in parts):
        return "sentencepiece"
    raise UserError(
        f"{where}: neither a byte-level nor a SentencePiece tokenizer, so that bytes a token can't be counted "
        f"({spec['model']['type']} with {', '.join(sorted(kinds)) or 'no pre-tokenizer'})"
    )


def _unspelled_bytes(spec: dict, style: str, backend: tokenizers.Tokenizer, where: str) -> bytes:
    """The bytes of UTF-8 that a vocabulary can't spell: those of control characters and of the planes above the third, which a
    published byte-level vocabulary may lack since texts seldom have them.

    Raises:
      UserError: it lacks another byte of UTF-8; a text would lose what is spelled with it, or have it as unknown.
    """
    characters = {byte: character for character, byte in _byte_of_character().items()}
    falls_back = style == "bytes" or spec["model"].get("byte_fallback")
    unspelled = bytearray()
    for byte in (*range(0xC0), *range(0xC2, 0xF5)):
        token = characters[byte] if style == "bytes" else f"<0x{byte:02X}>"
        if falls_back and backend.token_to_id(token) is not None:
            continue
        control = byte < 0x80 and not chr(byte).isprintable() and chr(byte) not in "\t\n\r"
        if falls_back and (control or byte > 0xF0):
            unspelled.append(byte)
            continue
        reason = f"it has no token for the byte 0x{byte:02X}" if falls_back else "it has no byte fallback"
        raise UserError(
            f"{where}: the tokenizer loses text that its vocabulary does not spell ({reason}), so that neither a text nor "
            "its bits per byte would be right; name another tokenizer"
        )
    return bytes(unspelled)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes_of(token: str, style: str) -> bytes:
    if style == "bytes":
        alphabet = _byte_of_character()
        # A few published vocabularies hold tokens outside the alphabet; no text ever becomes one.
        return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else b""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _groups(sizes: list[int], limit: int) -> Iterator[slice]:
    """Neighbours whose sizes sum to the limit or little more."""
    start = held = 0
    for end, size in enumerate(sizes, start=1):
        held += size
        if held >= limit or end == len(sizes):
            yield slice(start, end)
            start, held = end, 0


def _split(text: str, limit: int) -> list[str]:
    """Cuts a long text after a line that ends in a word and before one that starts at the margin.

    There the pre-tokenizers of GPT-2, GPT-4 and Llama 3 cut as well, so that the tokens stay the same. A part without
    such a place is cut at its end, which changes the tokens around the cut and loses nothing.
    """
    parts, start = [], 0
    while len(text) - start > limit:
        cut = end = start + limit
        while (cut := text.rfind("\n", start + limit // 2, cut)) >= 0:
            if text[cut - 1].isalnum() and not text[cut + 1].isspace():
                end = cut + 1
                break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]
