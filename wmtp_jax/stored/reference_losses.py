"""What a model says of every token of a corpus, computed once and kept beside the tokens: a reference's losses and entropies.

They lie in `CORPUS/reference_loss/KEY/`, two files a source and side, KEY being the hash of the model; the corpus's own
directory is that of its documents and its tokenizer. What was computed before an interruption is kept in parts and not
computed again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.data.corpus import Corpus, PackedSource
from wmtp_jax.data.scan import SPLITS
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.settings import REFERENCE_COLUMNS
from wmtp_jax.storage import cache, s3

FOLDER = "reference_loss"
_FORMAT = 2  # 1 had no entropies
_BATCHES_A_PART = 16

# tokens, segment_ids [B, S] -> what each of REFERENCE_COLUMNS holds, [B, S] float32
RowScore = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]


def row_batches(
    packed: PackedSource, side: str, size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray | None]]:
    """How many rows are real, and tokens, segment_ids and labels `[size, S]` of a side's rows in order; the last batch is filled
    up with padding, so that what is compiled sees one shape."""
    rows = packed.train if side == "train" else packed.validation
    labels = packed.labels[side] if packed.labels else None
    for start in range(0, len(rows), size):
        columns = rows[start : start + size]
        tokens, segment_ids = columns["tokens"].astype(np.int32), columns["segment_ids"].astype(np.int32)
        count = len(tokens)
        padding = ((0, size - count), (0, 0))
        here = None if labels is None else np.pad(np.asarray(labels[start : start + size]), padding)
        yield count, np.pad(tokens, padding), np.pad(segment_ids, padding), here


def in_parts(directory: Path, name: str, results: Iterator[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """The results of functions that cost something, concatenated by some at a time; each part is kept as a file as soon as it is
    there, and read instead of computed where it was kept before.

    Args:
      directory: of the parts, see `kept_parts`.
      name: of this sequence in it.
      results: in order; those of a part that is kept are not called.
    """
    number, waiting = 0, []
    for result in results:
        waiting.append(result)
        if len(waiting) == _BATCHES_A_PART:
            yield _part(directory / f"{name}-{number}.npy", waiting)
            number, waiting = number + 1, []
    if waiting:
        yield _part(directory / f"{name}-{number}.npy", waiting)


@contextmanager
def kept_parts(directory: Path) -> Iterator[None]:
    """Removes parts when what they are for is in place, and when a result was refused; an interruption leaves them."""
    try:
        yield
    except UserError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)


def _part(path: Path, results: list[Callable[[], np.ndarray]]) -> np.ndarray:
    if path.exists():
        return np.load(path)
    array = np.concatenate([result() for result in results])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)
    return array


# ---- reference losses ------------------------------------------------------------------------------------------------


def make_losses(
    corpus: Corpus, score: RowScore, *, facts: dict[str, Any], batch_rows: int, progress: Callable[[int, int], None]
) -> Path:
    """Computes a reference's loss on every token of the corpus and its entropy there, or finds them computed, and says where
    they lie.

    Args:
      corpus: what is scored.
      score: see `stage.Backend.next_token_statistics`.
      facts: JSON values that say what scored: `model`, its key, and more for people.
      batch_rows: B.
      progress: called with the rows done and all rows, after every part.
    """
    directory = _directory(corpus, facts["model"])
    parts = directory.with_name(f".{directory.name}.parts")
    with disk_errors(corpus.directory, setting="config.data.cache_dir"):
        with kept_parts(parts):
            cache.make_once(directory, lambda partial: _build(corpus, score, partial, parts, facts, batch_rows, progress))
    return directory


def _build(
    corpus: Corpus, score: RowScore, directory: Path, parts: Path, facts: dict[str, Any], batch_rows: int,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    sides = [(number, side) for number in range(len(corpus.sources)) for side in SPLITS]
    rows = {(n, side): getattr(corpus.sources[n], side) for n, side in sides}
    done, total = 0, sum(map(len, rows.values()))
    for number, side in sides:
        packed = corpus.sources[number]
        shape = rows[number, side].columns["tokens"].shape

        def results(packed: PackedSource = packed, side: str = side) -> Iterator[Callable[[], np.ndarray]]:
            for count, tokens, segment_ids, _ in row_batches(packed, side, batch_rows):
                yield lambda n=count, t=tokens, s=segment_ids: np.stack(score(t, s))[:, :n].swapaxes(0, 1).astype(np.float32)

        with ExitStack() as opened:
            files = [opened.enter_context(_path(directory, number, side, name).open("wb")) for name in REFERENCE_COLUMNS]
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
            for file in files:
                np.lib.format.write_array_header_1_0(file, header)
            for part in in_parts(parts, f"{batch_rows}-{number}-{side}", results()):  # [rows, columns, S]
                if not np.isfinite(part).all():
                    where = f"config.reference.path: a loss or entropy on {packed.name} ({side})"
                    raise UserError(f"{where} is not finite; the model is broken")
                for file, column in zip(files, part.swapaxes(0, 1), strict=True):
                    file.write(np.ascontiguousarray(column).tobytes())
                done += len(part)
                progress(done, total)
    about = {**facts, "corpus": corpus.hash, "tokenizer": corpus.tokenizer.fingerprint, "format": _FORMAT}
    (directory / "manifest.json").write_text(json.dumps(about, indent=2) + "\n")


def find_losses(corpus: Corpus, setting: str, model: Callable[[], str]) -> Path | None:
    """The stored losses that a run is to take; None: it computes its own in every step.

    Args:
      corpus: what it trains on.
      setting: config.reference.losses: auto, step, or a directory that `make_losses` gave.
      model: tells the key of the run's reference.

    Raises:
      UserError: stored losses are there, or named, and of another model, tokenizer or corpus.
    """
    if setting == "step":
        return None
    if setting != "auto":
        _check(s3.local(setting), corpus, model())
        return s3.local(setting)
    kept = [path.parent for path in (corpus.directory / FOLDER).glob("[!.]*/manifest.json")]
    kept = [path for path in kept if not path.suffix]  # not what another process is making
    if not kept:
        return None
    key = model()
    wanted = _directory(corpus, key)
    if wanted in kept:
        return wanted
    remedy = "with python -m wmtp_jax.score, or set config.reference.losses=step to compute them in every step"
    for earlier in (_directory(corpus, key, version) for version in range(1, _FORMAT)):
        if earlier in kept:
            raise UserError(f"{earlier}: was made by an earlier version, without the reference's entropies; score again {remedy}")
    raise UserError(
        f"{kept[0]}: holds this data's losses under another reference than config.reference.path; score it {remedy}"
    )


def _check(directory: Path, corpus: Corpus, model: str) -> None:
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        have = {key: manifest[key] for key in ("model", "tokenizer", "corpus", "format")}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"config.reference.losses = {str(directory)!r}: no losses that python -m wmtp_jax.score made are there"
        ) from error
    want = {"tokenizer": corpus.tokenizer.fingerprint, "corpus": corpus.hash, "model": model, "format": _FORMAT}
    for key, value in want.items():
        if have[key] != value:
            raise UserError(
                f"config.reference.losses = {str(directory)!r}: were made with another {key} ({str(have[key])[:12]}, this run "
                f"has {str(value)[:12]}); score again with python -m wmtp_jax.score"
            )


def with_losses(corpus: Corpus, directory: Path, names: tuple[str, ...] = REFERENCE_COLUMNS) -> Corpus:
    """The corpus with these of `REFERENCE_COLUMNS`, `[N, S]` float32 each, as they were stored.

    Raises:
      UserError: a file is missing, or is not of the rows' shape.
    """
    columns = []
    for number, source in enumerate(corpus.sources):
        columns.append({})
        for side in SPLITS:
            shape = getattr(source, side).columns["tokens"].shape
            columns[-1][side] = {name: _stored(directory, _path(directory, number, side, name), shape) for name in names}
    return corpus.with_columns(columns)


def _stored(directory: Path, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or missing ({error}); remove {directory} and score again") from error
    if array.shape != shape or array.dtype != np.float32:
        raise UserError(f"{path}: {array.dtype} {array.shape}, other than the rows; remove {directory} and score again")
    return array


def has_losses(corpus: Corpus) -> bool:
    """Whether its rows hold a reference's losses."""
    return REFERENCE_COLUMNS[0] in corpus.sources[0].train.columns


def _directory(corpus: Corpus, model: str, version: int = _FORMAT) -> Path:
    name = hashlib.sha256(json.dumps([version, model]).encode()).hexdigest()[:32]
    return corpus.directory / FOLDER / name


def _path(directory: Path, number: int, side: str, name: str) -> Path:
    return directory / f"{number}-{side}-{name}.npy"
