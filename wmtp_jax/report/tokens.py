"""tokens/STEP.npz as the token map shows it: by token, not by (position, head), in few bytes.

A weight belongs to a (position, head) and is about the token that this head predicts there. The map shades tokens, so that
token x[t] gets, for head k, the entry of (t - 1 - k, k).
"""

from __future__ import annotations

import base64
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.evaluation.token_kinds import KINDS
from wmtp_jax.report.runs import Run
from wmtp_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

BY_HEAD = ("weight", "loss", "reference_loss", "reference_entropy")
QUANTITIES = (*BY_HEAD, "value")
UNRECORDED = len(KINDS)  # the kind of tokens in files of earlier versions
MISSING, NOT_FINITE = 65535, 65534  # codes of `pack`
_PLACES = 3  # decimals that are kept


@dataclass(frozen=True)
class Documents:
    """The validation text that a run's weights were looked at on; T tokens in N pieces of documents, one after the other.

    Attributes:
      tokens: int32 `[T]`.
      kinds: uint8 `[T]`, indices into `token_kinds.KINDS`, or `UNRECORDED`.
      starts: int `[N + 1]`, where each piece begins, and T.
      place: int `[T]`, flat indices into the rows `[B, S]` of the files.
      tokenizer: that the texts are in.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    starts: np.ndarray
    place: np.ndarray
    tokenizer: Tokenizer

    def first(self, count: int) -> Documents:
        """The first `count` pieces."""
        starts = self.starts[: count + 1]
        end = int(starts[-1])
        return Documents(self.tokens[:end], self.kinds[:end], starts, self.place[:end], self.tokenizer)


def read_documents(runs: Sequence[Run]) -> Documents | None:
    """The documents that the runs have in common; None where no run has kept any yet.

    Raises:
      UserError: two runs have other documents or tokenizers, so that their tokens can't stand side by side; or a file is
        damaged.
    """
    first: tuple[Run, Documents, dict[str, np.ndarray]] | None = None
    for run in runs:
        for file in list(run.token_files.values())[-1:]:
            arrays, tokenizer = read_entries(file), _tokenizer(run)
            if first is None:
                first = (run, _documents(arrays, tokenizer), arrays)
                continue
            other, documents, theirs = first
            hint = "report them one by one, or without the token map (--notokens)"
            if documents.tokenizer.fingerprint != tokenizer.fingerprint:
                raise UserError(f"{run.path}: has another tokenizer than {other.path}; {hint}")
            if not all(np.array_equal(arrays[name], theirs[name]) for name in ("tokens", "segment_ids")):
                raise UserError(f"{run.path}: kept other validation documents than {other.path}; {hint}")
    return first and first[1]


def read_entries(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a tokens/STEP.npz.

    Raises:
      UserError: it is damaged.
    """
    try:
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it") from error
    lacking = [name for name in ("tokens", "segment_ids", "mask", "weight", "loss") if name not in arrays]
    if lacking:
        raise UserError(f"{file}: has no {', '.join(lacking)}; remove it")
    return arrays


def files_on(run: Run, documents: Documents) -> dict[int, Path]:
    """The run's files about these documents: a continued run may have kept others before (`eval.token_rows` may change)."""
    kept = {}
    for step, file in run.token_files.items():
        arrays = read_entries(file)
        tokens = arrays["tokens"].ravel()
        if documents.place[-1] < tokens.size and np.array_equal(tokens[documents.place], documents.tokens):
            kept[step] = file
    return kept


def by_token(arrays: dict[str, np.ndarray], documents: Documents) -> dict[str, np.ndarray]:
    """What is known of every token: `weight`, `loss` and what was read of a reference, `reference_loss` and perhaps
    `reference_entropy`, float64 `[T, H]`, NaN where the token is no target of a head; with a critic, `value [T]`."""
    mask = arrays["mask"]
    found = {}
    for name in BY_HEAD:
        if name in arrays:
            entries = np.where(mask, arrays[name].astype(np.float64), np.nan)
            shifted = np.full_like(entries, np.nan)
            for k in range(mask.shape[-1]):
                shifted[:, k + 1 :, k] = entries[:, : mask.shape[1] - k - 1, k]
            found[name] = shifted.reshape(-1, mask.shape[-1])[documents.place]
    if "value" in arrays:
        found["value"] = arrays["value"].astype(np.float64).ravel()[documents.place]
    return found


def spell(documents: Documents) -> tuple[list[str], np.ndarray]:
    """The distinct tokens' texts, and for each of the T tokens which: int `[T]`. Bytes that are no whole characters are
    spelled \\xNN."""
    distinct, index = np.unique(documents.tokens, return_inverse=True)
    tokenizer = documents.tokenizer
    texts = []
    for token in distinct.tolist():
        piece = tokenizer.piece(token)
        texts.append(piece.decode(errors="backslashreplace") if piece else tokenizer.decode([token]))
    return texts, index


def pack(values: np.ndarray) -> dict[str, Any]:
    """Numbers in 16 bits each: `(low + code) * unit`, deflated, in base64.

    The unit is a thousandth, or a power of ten times that where the numbers spread over more than 65: what is shown with
    three decimals is then the number rounded. NaN is `MISSING`, infinities are `NOT_FINITE`. Low bytes come first, then high
    ones, which deflate better so.
    """
    finite = values[np.isfinite(values)]
    places = _PLACES
    low = 0
    if len(finite):
        while math.floor(finite.max() * 10**places) - math.floor(finite.min() * 10**places) > NOT_FINITE - 3:
            places -= 1
        low = round(float(finite.min()) * 10**places)
    codes = np.full(values.shape, MISSING, np.uint16)
    codes[np.isinf(values)] = NOT_FINITE
    good = np.isfinite(values)
    codes[good] = np.round(values[good] * 10.0**places).astype(np.int64) - low
    return {"data": _deflated(codes), "low": low, "places": places}


def pack_indices(values: np.ndarray) -> dict[str, Any]:
    """Small non-negative integers, as `pack` gives numbers; UserError is not for this: more than 65,000 are a bug."""
    if values.size and int(values.max()) >= NOT_FINITE:
        raise ValueError(f"indices up to {values.max()} don't fit into 16 bits")
    return {"data": _deflated(values.astype(np.uint16)), "low": 0, "places": 0}


def _deflated(codes: np.ndarray) -> str:
    planes = codes.astype("<u2").reshape(-1, 1).view(np.uint8).T.tobytes()
    return base64.b64encode(zlib.compress(planes, 6)).decode("ascii")


def _documents(arrays: dict[str, np.ndarray], tokenizer: Tokenizer) -> Documents:
    segments = arrays["segment_ids"]
    rows = np.broadcast_to(np.arange(len(segments))[:, None], segments.shape)
    place = np.flatnonzero(segments.ravel() > 0)
    piece = np.stack([rows.ravel()[place], segments.ravel()[place]])
    new = np.flatnonzero(np.any(np.diff(piece, axis=1, prepend=-1), axis=0))
    kinds = arrays.get("kinds", np.full(segments.shape, UNRECORDED, np.uint8))
    starts = np.append(new, len(place))
    return Documents(arrays["tokens"].ravel()[place], kinds.ravel()[place], starts, place, tokenizer)


def _tokenizer(run: Run) -> Tokenizer:
    directory = run.path / "tokenizer"
    if not directory.is_dir():
        raise UserError(f"{directory}: not there, so that the run's tokens can't be read; restore it, or use --notokens")
    return load_tokenizer(directory)
