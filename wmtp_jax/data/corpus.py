"""The tokenised corpus: made once from the sources, kept on disk by content hash, opened in milliseconds after that."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from wmtp_jax.data import packing
from wmtp_jax.data.chat import Chat
from wmtp_jax.data.documents import FIELDS, Document
from wmtp_jax.data.packer import SourcePacker, too_long_message
from wmtp_jax.data.scan import SPLITS, Scan, kept_documents, scan
from wmtp_jax.data.sources import Source, open_source
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.storage import cache
from wmtp_jax.storage.long_work import LongWork
from wmtp_jax.tokenizer.tokenizer import MIN_BPE_VOCABULARY, Tokenizer, load_tokenizer, train_bpe

_log = logging.getLogger(__name__)

# Part of every request: raise it where the same files would give other documents, or other sides.
_REQUEST_FORMAT = 2
# Part of a corpus's key, beside its documents: raise it where the same documents would give other rows. Format 2 ends
# conversations in another way, and packs plain texts beside others that stay whole in another way. All else is packed as
# ever, so that runs, reference losses and rewards of earlier corpora go on.
_ROWS_FORMAT, _FIRST_ROWS_FORMAT = 2, 1
# Part of a trained tokenizer's key: raise it where the same sample would give another one.
_TOKENIZER_FORMAT = 1
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
      counts: `documents`, `tokens` (what begins and ends a document included), `bytes` (UTF-8) and `rows` of either side.
      dropped: documents left out, by reason.
      labels: of either side, float32 `[N, S]`: 1 for right, 0 for wrong, or any number, on every token of a document, NaN
        where it has none and in padding; None where no document has one.
    """

    name: str
    train: packing.Rows
    validation: packing.Rows
    counts: dict[str, dict[str, int]]
    dropped: dict[str, int]
    labels: dict[str, np.ndarray] | None = None


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

    def with_columns(self, columns: Sequence[Mapping[str, Mapping[str, np.ndarray]]]) -> Corpus:
        """The same corpus with more columns in its rows.

        Args:
          columns: for each source, by side and name, `[N, S]` each; the same names throughout.

        Raises:
          ValueError: a column of another shape than the rows.
        """

        def longer(rows: packing.Rows, more: Mapping[str, np.ndarray]) -> packing.Rows:
            for name, column in more.items():
                if column.shape != rows.columns["tokens"].shape:
                    raise ValueError(f"{name} has shape {column.shape}, the rows {rows.columns['tokens'].shape}")
            return packing.Rows(rows.columns | dict(more))

        sources = [
            replace(
                source,
                train=longer(source.train, more["train"]),
                validation=longer(source.validation, more["validation"]),
            )
            for source, more in zip(self.sources, columns, strict=True)
        ]
        return replace(self, sources=tuple(sources))

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
    bos: str = "auto",
    vocabulary_size: int = 1024,
    validation_fraction: float = 0.03,
    cache_dir: str = "",
    label_field: str = "passed",
    failed_in_loss: bool = False,
) -> Corpus:
    """The packed rows of the sources: from the cache if their files are as they were, else made, and kept there.

    A file counts as unchanged while its size and modification time are; otherwise its content is hashed again. Sources
    are checked in full before a row is written. Several processes may call this at the same time.

    Args:
      sources: names that `sources.open_source` knows.
      sequence_length: S, tokens a row.
      weights: the share of rows from each source, above 0; None or empty: in proportion to their rows.
      tokenizer: "bpe" (trained on a sample of the training side), or what `tokenizer.load_tokenizer` takes.
      bos: what every segment begins with: auto (what the tokenizer puts before a text, if anything) | always | never, see
        `Tokenizer.with_begin`.
      vocabulary_size: V of the trained tokenizer; has no say where a tokenizer is named.
      validation_fraction: the share of documents held out, where a source doesn't say itself which are.
      label_field: the field of `jsonl:` objects that says whether a text is right (bool) or how good (number).
      failed_in_loss: tokens of documents with the label False may be targets, too.
      cache_dir: as `cache.cache_directory` takes it.

    Raises:
      UserError: whatever the user can put right; nothing half-written is left behind.
    """
    _check_arguments(sources, sequence_length, weights, tokenizer, vocabulary_size, validation_fraction, label_field, bos)
    root = cache.cache_directory(cache_dir)
    named_tokenizer = None if tokenizer == "bpe" else load_tokenizer(tokenizer).with_begin(bos, key="config.data.bos")
    chat = Chat(named_tokenizer)
    opened = [open_source(name, label_field=label_field, chat=chat) for name in sources]
    request = {
        "format": _REQUEST_FORMAT,
        "sources": [[source.name.partition(":")[0], source.location] for source in opened],
        "tokenizer": named_tokenizer.fingerprint if named_tokenizer else f"bpe:{vocabulary_size}",
        "chat_template": named_tokenizer.chat_template_hash if named_tokenizer else "",
        "sequence_length": sequence_length,
        "validation_fraction": validation_fraction,
        "label_field": label_field,
        "failed_in_loss": failed_in_loss,
    }
    make = functools.partial(
        _make, opened, root, named_tokenizer, sequence_length=sequence_length, vocabulary_size=vocabulary_size,
        validation_fraction=validation_fraction, failed_in_loss=failed_in_loss,
    )  # fmt: skip
    note_path = root / "requests" / f"{_key(request)}.json"
    with disk_errors(root, setting="config.data.cache_dir"):
        note = json.loads(note_path.read_bytes()) if note_path.exists() else None
        if note is None or _files_changed(note, opened) or not (root / "corpora" / note["corpus"]).is_dir():
            note = make(previous=note)
            cache.write_file(note_path, json.dumps(note).encode())
    for source, verdicts in zip(opened, note["scores_are_verdicts"], strict=True):
        if verdicts and not failed_in_loss:
            print(
                f"{source.name}: its labels (config.data.label_field = {label_field!r}) are the numbers 0 and 1, which are "
                "scores: texts labelled 0 are trained on, too; write false and true to leave wrong texts out of the loss",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    corpus = _open(opened, root / "corpora" / note["corpus"], note, tuple(weights) if weights else None)
    for source in corpus.sources:
        if weights and not len(source.train):
            raise UserError(
                f"config.data.source_weights = {tuple(weights)}: {source.name} has no text for training that is not in another "
                "source or held out, so it can have no share; leave it out"
            )
    return corpus


def _check_arguments(
    sources: Sequence[str], sequence_length: int, weights: Sequence[float] | None, tokenizer: str, vocabulary_size: int,
    validation_fraction: float, label_field: str, bos: str,
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
    if tokenizer == "bpe" and bos == "always":
        raise UserError("config.data.bos = 'always': the trained bpe has no such token; set it to 'auto', or name a tokenizer")
    if label_field in FIELDS:
        raise UserError(f"config.data.label_field = {label_field!r}: that field of an object has another meaning")


def _files_changed(note: dict, sources: list[Source]) -> bool:
    """Whether any file has another name, size or modification time than when the note was written."""
    before = [[row[:3] for row in files] for files in note["files"]]
    return before != [[[file.name, file.size, file.mtime_ns] for file in source.files] for source in sources]


def _make(
    sources: list[Source], root: Path, tokenizer: Tokenizer | None, *, sequence_length: int, vocabulary_size: int,
    validation_fraction: float, failed_in_loss: bool, previous: dict | None,
) -> dict:  # fmt: skip
    """Makes whatever the cache lacks; returns the note that finds it again."""
    root.mkdir(parents=True, exist_ok=True)
    sample_bytes = max(_BPE_SAMPLE_BYTES, _BPE_SAMPLE_BYTES_PER_TOKEN * vocabulary_size) if tokenizer is None else 0
    found = scan(sources, validation_fraction=validation_fraction, sample_bytes=sample_bytes, scratch=root)
    if tokenizer is None:
        tokenizer = _trained_tokenizer(root, found.sample, vocabulary_size)
    as_ever = not any(traits.chat or (traits.parts and traits.plain) for traits in found.traits)
    key = {
        "format": _FIRST_ROWS_FORMAT if as_ever else _ROWS_FORMAT,
        "documents": found.content_hash,
        "tokenizer": tokenizer.fingerprint,
        "sequence_length": sequence_length,
    }
    if failed_in_loss and any(traits.failed for traits in found.traits):
        key["failed_in_loss"] = True
    files = [
        [[file.name, file.size, file.mtime_ns, content] for file, content in zip(source.files, hashes, strict=True)]
        for source, hashes in zip(sources, found.file_hashes, strict=True)
    ]
    verdicts = [traits.scores_are_verdicts for traits in found.traits]
    note = {"corpus": _key(key), "files": files, "dropped": found.dropped, "scores_are_verdicts": verdicts}
    if previous is not None and previous["corpus"] != note["corpus"]:
        _say_what_changed(previous["files"], files)

    def build(directory: Path) -> None:
        manifest = _pack(sources, found, tokenizer, sequence_length, failed_in_loss, scratch=root, directory=directory)
        tokenizer.save(directory / "tokenizer")
        (directory / "manifest.json").write_text(json.dumps(key | manifest, indent=2))

    cache.make_once(root / "corpora" / note["corpus"], build)
    return note


def _trained_tokenizer(root: Path, sample: list[str], vocabulary_size: int) -> Tokenizer:
    content = hashlib.sha256()
    for text in sample:
        content.update(hashlib.blake2b(text.encode(), digest_size=16).digest())
    key = {"format": _TOKENIZER_FORMAT, "sample": content.hexdigest(), "vocabulary_size": vocabulary_size}
    directory = root / "tokenizers" / _key(key)

    def build(partial: Path) -> None:
        megabytes = sum(map(len, sample)) / 1e6
        _log.info("training a byte-level BPE of %d tokens on %.1f MB of text", vocabulary_size, megabytes)
        with LongWork(f"training a byte-level BPE of {vocabulary_size:,} tokens on {megabytes:.1f} MB of text"):
            trained = train_bpe(sample, vocabulary_size=vocabulary_size)
        if trained.vocabulary_size < vocabulary_size:
            _log.warning("the sources give only %d tokens of %d", trained.vocabulary_size, vocabulary_size)
        trained.save(partial)

    cache.make_once(directory, build)
    return load_tokenizer(directory)


def _pack(
    sources: list[Source], found: Scan, tokenizer: Tokenizer, sequence_length: int, failed_in_loss: bool, *, scratch: Path,
    directory: Path,
) -> dict:  # fmt: skip
    """Writes the rows of all sources; returns what the manifest says about them."""
    # Batches of one corpus have the same columns, whichever source a row is from.
    masked = any(traits.parts or (traits.failed and not failed_in_loss) for traits in found.traits)
    columns = ["tokens", "segment_ids", *(["loss_mask"] if masked else [])]
    manifest: dict = {"columns": columns, "counts": [], "too_long": [], "labelled": []}
    too_long: list[int] = []
    targets = dict.fromkeys(SPLITS, 0)
    for number, source in enumerate(sources):
        packer = SourcePacker(tokenizer, sequence_length, scratch, failed_in_loss=failed_in_loss)
        _log.info("tokenising %s: %d files", source.name, len(source.files))
        for batch in _batches(kept_documents(source, number, found, doing="tokenising")):
            packer.add(batch)
        packer.check(source.name)
        labelled = found.traits[number].labelled
        written = [*columns, "labels"] if labelled else columns
        manifest["counts"].append(
            packer.write(source.name, written, lambda side, number=number: _column_paths(directory, number, side))
        )
        manifest["too_long"].append(len(packer.too_long))
        too_long += packer.too_long
        for side in SPLITS:
            targets[side] += packer.targets[side]
        manifest["labelled"].append(labelled)
    if not any(counts["validation"]["documents"] for counts in manifest["counts"]):
        raise UserError(too_long_message("all documents held out", sequence_length, too_long))
    for side in SPLITS:
        if not targets[side]:
            raise UserError(
                f"config.data.sources: every document for {side} has the label False, so that there is no target; add right "
                "ones, or set config.data.failed_in_loss"
            )
    return manifest


def _batches(documents: Iterable[tuple[str, bool, Document]]) -> Iterator[list[tuple[str, bool, Document]]]:
    """Documents as `SourcePacker.add` takes them, some megabytes at a time."""
    batch: list[tuple[str, bool, Document]] = []
    held = 0
    for side, joined, document in documents:
        batch.append((side, joined, document))
        held += len(document.text)
        if held >= _CHARACTERS_AT_ONCE or len(batch) == _DOCUMENTS_AT_ONCE:
            yield batch
            batch, held = [], 0
    yield batch


def _open(sources: list[Source], directory: Path, note: dict, weights: tuple[float, ...] | None) -> Corpus:
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        if "columns" not in manifest:  # made before there were others
            plain = {
                "columns": ["tokens", "segment_ids"],
                "labelled": [False] * len(sources),
                "too_long": [0] * len(sources),
            }
            manifest |= plain
        packed = [_open_source(source, number, directory, manifest, note) for number, source in enumerate(sources)]
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: the cached corpus is damaged ({error}); remove that directory") from error
    tokenizer = load_tokenizer(directory / "tokenizer")
    return Corpus(tuple(packed), weights, tokenizer, manifest["sequence_length"], directory.name, directory)


def _open_source(source: Source, number: int, directory: Path, manifest: dict, note: dict) -> PackedSource:
    paths = {side: _column_paths(directory, number, side) for side in SPLITS}
    rows = {
        side: packing.Rows({name: packing.open_column(path_of(name)) for name in manifest["columns"]})
        for side, path_of in paths.items()
    }
    labels = None
    if manifest["labelled"][number]:
        labels = {side: packing.open_column(path_of("labels")) for side, path_of in paths.items()}
    dropped = note["dropped"][number] | {"too_long": manifest["too_long"][number]}
    return PackedSource(source.name, rows["train"], rows["validation"], manifest["counts"][number], dropped, labels)


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
