"""All that the page shows, as one JSON value, thinned to a size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmtp_jax.evaluation.token_kinds import KINDS
from wmtp_jax.report import series
from wmtp_jax.report.runs import Group, Run
from wmtp_jax.report.tokens import (
    QUANTITIES,
    UNRECORDED,
    Documents,
    by_token,
    files_on,
    pack,
    pack_indices,
    read_entries,
    spell,
)

_SUMMARY = ("eval/bits_per_byte", "train/effective_sample_fraction")
_DOMAIN_SHARE = 99.5  # percentile that the darkest shade stands for: a few outliers would leave all else pale


class Packed(NamedTuple):
    """The numbers of one quantity in a file, for the page, and between what most of them lie."""

    numbers: dict[str, Any]
    range: tuple[float, float]


def page_content(
    runs: Sequence[Run], groups: Sequence[Group], documents: Documents | None, *, steps: int, pieces: int, limit: int
) -> tuple[dict[str, Any], str]:
    """The page's data, and what was left out of the token map to keep it small ("" for nothing).

    Args:
      documents: of the token map; None: it is left out.
      steps: token maps of so many training steps of each run at most, evenly spread, the first and the last among them.
      pieces: so many pieces of documents at most.
      limit: bytes of JSON; steps are left out first, down to the first and the last, then documents.
    """
    content = {
        "runs": [_about(run) for run in runs],
        "groups": [{"label": group.label, "runs": list(group.members)} for group in groups],
        "curves": series.curves(runs, groups),
        "depth": series.depth_charts(runs, groups),
        "kindAccuracy": series.kind_accuracy(runs, groups),
        "map": None,
    }
    if documents is None:
        return content, ""
    limit -= len(json.dumps(content))
    files = [files_on(run, documents) for run in runs]
    kept = {step for run in runs for step in run.token_files}
    available, most = len(documents.starts) - 1, max(map(len, files))
    pieces, steps = min(pieces, available), min(steps, most)
    cache: dict[tuple[int, int], dict[str, Packed]] = {}
    while True:
        drawn = _map(files, documents.first(pieces), documents, steps, cache)
        size = len(json.dumps(drawn))
        if size <= limit or (steps <= 2 and pieces <= 1):
            break
        if steps > 2:
            steps = max(2, min(steps - 1, steps * limit // size))
        else:
            pieces = max(1, min(pieces - 1, pieces * limit // size))
            cache.clear()
    content, left = content | {"map": drawn}, []
    if pieces < available:
        left.append(f"{pieces} of {available} pieces of documents")
    if len(drawn["steps"]) < len(kept):
        left.append(f"{len(drawn['steps'])} of {len(kept)} steps")
    return content, ", ".join(left)


def _about(run: Run) -> dict[str, Any]:
    last: dict[str, float] = {}
    for row in run.rows:
        last |= {name: row[name] for name in (*_SUMMARY, *(f"eval/ce_head_{k}" for k in range(run.heads))) if name in row}
    return {
        "name": run.name,
        "path": str(run.path),
        "algorithm": run.algorithm,
        "seed": run.seed,
        "heads": run.heads,
        "headKind": run.config.get("model.heads.kind", ""),
        "step": run.rows[-1]["step"] if run.rows else None,
        "last": {name: float(f"{value:.6g}") if np.isfinite(value) else None for name, value in last.items()},
        "missing": list(run.missing),
    }


def _map(
    files: Sequence[dict[int, Path]], shown: Documents, whole: Documents, steps: int,
    cache: dict[tuple[int, int], dict[str, Packed]],
) -> dict[str, Any]:  # fmt: skip
    texts, index = spell(shown)
    blobs: dict[str, int] = {}
    table: list[dict[str, Any]] = []

    def stored(packed: dict[str, Any]) -> int:
        """What two runs or steps share, a reference's losses say, is there once."""
        key = json.dumps(packed)
        if key not in blobs:
            blobs[key] = len(table)
            table.append(packed)
        return blobs[key]

    entries, ranges = [], {name: [] for name in QUANTITIES}
    for number, own in enumerate(files):
        at = {}
        for step in spread(list(own), steps):
            if (number, step) not in cache:
                arrays = by_token(read_entries(own[step]), whole)
                # Head by head, so that a head's numbers lie together.
                cache[number, step] = {
                    name: Packed(pack(np.ascontiguousarray(part.T)), _range(part))
                    for name, array in arrays.items()
                    for part in [array[: len(shown.tokens)]]
                }
            for name, packed in cache[number, step].items():
                ranges[name].append(packed.range)
            at[str(step)] = {name: stored(packed.numbers) for name, packed in cache[number, step].items()}
        entries.append(at)
    return {
        "texts": texts,
        "kindNames": [*KINDS, "not recorded"],
        "hasKinds": bool((shown.kinds != UNRECORDED).any()),
        "tokens": pack_indices(index),
        "kinds": pack_indices(shown.kinds),
        "starts": shown.starts.tolist(),
        "steps": sorted({int(step) for at in entries for step in at}),
        "entries": entries,
        "blobs": table,
        "domains": {name: _domain(name, parts) for name, parts in ranges.items() if parts},
    }


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return tuple(np.percentile(finite, (100 - _DOMAIN_SHARE, _DOMAIN_SHARE)).tolist()) if len(finite) else (0.0, 0.0)


def _domain(name: str, ranges: list[tuple[float, float]]) -> list[float]:
    """What the palest and the darkest shade stand for, the same over heads, steps and runs, so that all compare."""
    low = min(low for low, _ in ranges) if name == "value" else 0.0
    high = max(high for _, high in ranges)
    return [round(low, 3), round(max(high, low + 1e-3), 3)]


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, the last and (for two or more) the first among them."""
    if len(steps) <= most:
        return list(steps)
    if most == 1:
        return [steps[-1]]
    return [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))]
