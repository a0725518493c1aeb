"""The tokenised corpus: made once from the sources, kept on disk by content hash, opened in milliseconds after that."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wmtp_jax.data import cache, packing
from wmtp_jax.data.scan import DROPPED, SPLITS, Scan, digest_of, read_documents, scan
from wmtp_jax.data.sources import Document, Source, open_source
from wmtp_jax.data.tokenizer import MIN_BPE_VOCABULARY, Tokenizer, load_tokenizer, train_bpe
from wmtp_jax.errors import UserError, disk_errors

_log = logging.getLogger(__name__)

# Part of every key: raise it where the same documents would give other rows.
_FORMAT = 1
# The BPE counts pairs in a sample of the training side, drawn by hash. More gives no better vocabulary: at V = 1,024,
# 4, 8 and 12 MB of the standard library give 2.605, 2.621 and 2.621 bytes a token.
_BPE_SAMPLE_BYTES = 8_000_000
_BPE_SAMPLE_BYTES_PER_TOKEN = 1_000
_CHARACTERS_AT_ONCE = 1 << 21
_DOCUMENTS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class PackedSource:
    """One source's rows.

    Attributes:
      name: as the configuration has it.
      train, validation: the rows of either side.
      counts: `documents`, `tokens` (end-of-text tokens included), `bytes` (UTF-8) and `rows` of either side.
      dropped: documents left out, by reason.
    """

    name: str
    train: packing.Rows
    validation: packing.Rows
    counts: dict[str, dict[str, int]]
    dropped: dict[str, int]


@dataclass(frozen=True)
class Corpus:
    """Everything that a run reads its tokens from.

    Attributes:
      sources: in the order asked for.
      weights: the share of rows from each source, or None for shares in proportion to their rows.
      hash: of the documents, the tokenizer, the row length and the split; equal hashes hold equal rows.
      directory: where the rows lie.
    """

    sources: tuple[PackedSource, ...]
    weights: tuple[float, ...] | None
    tokenizer: Tokenizer
    sequence_length: int
    hash: str
    directory: Path

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes of a token, over both sides of all sources, end-of-text tokens included."""
        sides = [counts for source in self.sources for counts in source.counts.values()]
        return sum(side["bytes"] for side in sides) / sum(side["tokens"] for side in sides)

    def summary(self) -> dict:
        """What there is to say about the corpus before a run: plain numbers and strings."""
        return {
            "hash": self.hash,
            "directory": str(self.directory),
            "sequence_length": self.sequence_length,
            "vocabulary_size": self.tokenizer.vocabulary_size,
            "tokenizer": self.tokenizer.fingerprint,
            "bytes_per_token": self.bytes_per_token,
            "sources": [
                {
                    "name": source.name,
                    "weight": self.weights[number] if self.weights else None,
                    **{side: dict(source.counts[side]) for side in SPLITS},
                    "dropped": dict(source.dropped),
                }
                for number, source in enumerate(self.sources)
            ],
        }


def load_corpus(
    sources: Sequence[str],
    *,
    sequence_length: int,
    weights: Sequence[float] | None = None,
    tokenizer: str = "bpe",
    vocabulary_size: int = 1024,
    validation_fraction: float = 0.03,
    cache_dir: str = "",
) -> Corpus:
    """The packed rows of the sources: from the cache if their files are as they were, else made, and kept there.

    A file counts as unchanged while its size and modification time are; otherwise its content is hashed again. Sources
    are checked in full before a row is written. Several processes may call this at the same time.

    Args:
      sources: names that `sources.open_source` knows.
      sequence_length: S, tokens a row.
      weights: the share of rows from each source, above 0; None or empty: in proportion to their rows.
      tokenizer: "bpe" (trained on a sample of the training side), or what `tokenizer.load_tokenizer` takes.
      vocabulary_size: V of the trained tokenizer; has no say where a tokenizer is named.
      validation_fraction: the share of documents held out.
      cache_dir: as `cache.cache_directory` takes it.

    Raises:
      UserError: whatever the user can put right; nothing half-written is left behind.
    """
    _check_arguments(sources, sequence_length, weights, tokenizer, vocabulary_size, validation_fraction)
    root = cache.cache_directory(cache_dir)
    opened = [open_source(name) for name in sources]
    named_tokenizer = None if tokenizer == "bpe" else load_tokenizer(tokenizer)
    request = {
        "format": _FORMAT,
        "sources": [[source.name.partition(":")[0], source.location] for source in opened],
        "tokenizer": named_tokenizer.fingerprint if named_tokenizer else f"bpe:{vocabulary_size}",
        "sequence_length": sequence_length,
        "validation_fraction": validation_fraction,
    }
    note_path = root / "requests" / f"{_key(request)}.json"
    with disk_errors(root, setting="config.data.cache_dir"):
        note = json.loads(note_path.read_bytes()) if note_path.exists() else None
        if note is None or _files_changed(note, opened) or not (root / "corpora" / note["corpus"]).is_dir():
            note = _make(opened, root, named_tokenizer, sequence_length, vocabulary_size, validation_fraction, note)
            cache.write_file(note_path, json.dumps(note).encode())
    return _open(opened, root / "corpora" / note["corpus"], note, tuple(weights) if weights else None)


def _check_arguments(
    sources: Sequence[str], sequence_length: int, weights: Sequence[float] | None, tokenizer: str, vocabulary_size: int,
    validation_fraction: float,
) -> None:  # fmt: skip
    if not sources or not all(isinstance(name, str) for name in sources):
        raise UserError(f"config.data.sources = {tuple(sources)}: must be names of sources, at least one")
    if len(set(sources)) < len(sources):
        raise UserError(f"config.data.sources names a source twice: {', '.join(sources)}; give it more weight instead")
    if weights and (len(weights) != len(sources) or not all(0 < weight < float("inf") for weight in weights)):
        raise UserError(f"config.data.source_weights = {tuple(weights)}: must be one number above 0 for each source")
    if sequence_length < 2:
        raise UserError(f"config.data.sequence_length = {sequence_length}: must be at least 2")
    if not 0 < validation_fraction < 1:
        raise UserError(f"config.data.validation_fraction = {validation_fraction}: must be between 0 and 1")
    if tokenizer == "bpe" and vocabulary_size < MIN_BPE_VOCABULARY:
        raise UserError(f"config.data.vocabulary_size = {vocabulary_size}: must be at least {MIN_BPE_VOCABULARY}")


def _files_changed(note: dict, sources: list[Source]) -> bool:
    """Whether any file has another name, size or modification time than when the note was written."""
    before = [[row[:3] for row in files] for files in note["files"]]
    return before != [[[file.name, file.size, file.mtime_ns] for file in source.files] for source in sources]


def _make(
    sources: list[Source], root: Path, tokenizer: Tokenizer | None, sequence_length: int, vocabulary_size: int,
    validation_fraction: float, previous: dict | None,
) -> dict:  # fmt: skip
    """Makes whatever the cache lacks; returns the note that finds it again."""
    root.mkdir(parents=True, exist_ok=True)
    sample_bytes = max(_BPE_SAMPLE_BYTES, _BPE_SAMPLE_BYTES_PER_TOKEN * vocabulary_size) if tokenizer is None else 0
    found = scan(sources, validation_fraction=validation_fraction, sample_bytes=sample_bytes, scratch=root)
    if tokenizer is None:
        tokenizer = _trained_tokenizer(root, found.sample, vocabulary_size)
    key = {
        "format": _FORMAT,
        "documents": found.content_hash,
        "tokenizer": tokenizer.fingerprint,
        "sequence_length": sequence_length,
    }
    files = [
        [[file.name, file.size, file.mtime_ns, content] for file, content in zip(source.files, hashes, strict=True)]
        for source, hashes in zip(sources, found.file_hashes, strict=True)
    ]
    note = {"corpus": _key(key), "files": files, "dropped": found.dropped}
    if previous is not None and previous["corpus"] != note["corpus"]:
        _say_what_changed(previous["files"], files)

    def build(directory: Path) -> None:
        counts = [
            _pack_source(source, number, found, tokenizer, sequence_length, root, directory)
            for number, source in enumerate(sources)
        ]
        tokenizer.save(directory / "tokenizer")
        (directory / "manifest.json").write_text(json.dumps(key | {"counts": counts}, indent=2))

    cache.make_once(root / "corpora" / note["corpus"], build)
    return note


def _trained_tokenizer(root: Path, sample: list[str], vocabulary_size: int) -> Tokenizer:
    content = hashlib.sha256()
    for text in sample:
        content.update(digest_of(text.encode()))
    key = {"format": _FORMAT, "sample": content.hexdigest(), "vocabulary_size": vocabulary_size}
    directory = root / "tokenizers" / _key(key)

    def build(partial: Path) -> None:
        megabytes = sum(map(len, sample)) / 1e6
        _log.info("training a byte-level BPE of %d tokens on %.1f MB of text", vocabulary_size, megabytes)
        trained = train_bpe(sample, vocabulary_size=vocabulary_size)
        if trained.vocabulary_size < vocabulary_size:
            _log.warning("the sources give only %d tokens of %d", trained.vocabulary_size, vocabulary_size)
        trained.save(partial)

    cache.make_once(directory, build)
    return load_tokenizer(directory)


def _pack_source(
    source: Source, number: int, found: Scan, tokenizer: Tokenizer, sequence_length: int, scratch: Path, directory: Path
) -> dict[str, dict[str, int]]:
    """Tokenises one source and writes its rows; returns counts of either side."""
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary_size <= 1 << 16 else np.int32)
    stores = {side: packing.TokenStore(scratch, dtype) for side in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    _log.info("tokenising %s: %d files", source.name, len(source.files))
    for batch in _kept_documents(source, number, found):
        encoded = tokenizer.encode_batch([document.text for _, document in batch])
        ended: dict[str, list[np.ndarray]] = {side: [] for side in SPLITS}
        for (side, document), ids in zip(batch, encoded, strict=True):
            ended[side].append(np.append(ids, tokenizer.end_of_text_id))
            sizes[side] += len(document.text.encode())
        for side, store in stores.items():
            store.append(ended[side])
    counts = {}
    for side, store in stores.items():
        rows = -(-store.tokens // sequence_length)
        packing.write_columns(
            _column_paths(directory, number, side), packing.pack(store.shuffled(), sequence_length=sequence_length),
            rows=rows, sequence_length=sequence_length, token_dtype=dtype,
        )  # fmt: skip
        counts[side] = {"documents": store.documents, "tokens": store.tokens, "bytes": sizes[side], "rows": rows}
        store.close()
    return counts


def _kept_documents(source: Source, number: int, found: Scan) -> Iterator[list[tuple[str, Document]]]:
    """The documents of a source that the scan kept, some megabytes at a time, each with its side."""
    record = int(np.searchsorted(found.records["source"], number))
    end = int(np.searchsorted(found.records["source"], number, side="right"))
    batch: list[tuple[str, Document]] = []
    held = 0
    for document in read_documents(source, dict.fromkeys(DROPPED, 0), lambda content: None):
        digest = digest_of(document.text.encode())
        if record == end or digest != found.records[record].tobytes()[:16]:
            raise UserError(f"{source.name}: a file changed while it was being read; start again")
        if found.keep[record]:
            batch.append((SPLITS[int(found.records[record]["validation"])], document))
            held += len(document.text)
        record += 1
        if held >= _CHARACTERS_AT_ONCE or len(batch) == _DOCUMENTS_AT_ONCE:
            yield batch
            batch, held = [], 0
    if record != end:
        raise UserError(f"{source.name}: a file changed while it was being read; start again")
    yield batch


def _open(sources: list[Source], directory: Path, note: dict, weights: tuple[float, ...] | None) -> Corpus:
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        sides = [
            {side: packing.open_rows(_column_paths(directory, number, side)) for side in SPLITS}
            for number in range(len(sources))
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: the cached corpus is damaged ({error}); remove that directory") from error
    packed = [
        PackedSource(source.name, rows["train"], rows["validation"], counts, dropped)
        for source, rows, counts, dropped in zip(sources, sides, manifest["counts"], note["dropped"], strict=True)
    ]
    tokenizer = load_tokenizer(directory / "tokenizer")
    return Corpus(tuple(packed), weights, tokenizer, manifest["sequence_length"], directory.name, directory)


def _column_paths(directory: Path, number: int, side: str) -> Callable[[str], Path]:
    return lambda column: directory / f"{number}-{side}-{column}.npy"


def _say_what_changed(before: list[list], after: list[list]) -> None:
    def contents(files: list[list]) -> dict[tuple[int, str], str]:
        return {(number, row[0]): row[3] for number, rows in enumerate(files) for row in rows}

    old, new = contents(before), contents(after)
    differ = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if differ:
        _log.warning("the corpus changed: %d file(s) differ, e.g. %s; tokenising again", len(differ), differ[0][1])


def _key(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
