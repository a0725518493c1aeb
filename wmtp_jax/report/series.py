"""Curves and charts as numbers, drawn alike by the page and by the PNG figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from wmtp_jax.report.runs import Group, Run

POINTS = 240  # of a curve at most
# (metric, title, unit), in reading order; `{k}` stands for every head.
PANELS = (
    ("eval/bits_per_byte", "Bits per byte, held out", "bits a byte, head 0"),
    ("eval/ce_head_{k}", "Cross-entropy of head {k}, held out", "nats a token"),
    ("train/loss", "Training loss, weighted", "nats; compares with nothing but itself"),
    ("train/effective_sample_fraction", "Effective sample fraction", "1: all tokens weigh the same"),
    ("train/weight_entropy", "Evenness over heads", "1: heads of a position weigh the same"),
    ("eval/explained_variance", "Explained variance of rewards", "held out; 0 for a constant"),
    ("eval/value_loss", "Value loss, held out", "squared error"),
    ("train/grad_norm", "Gradient norm", "of the model"),
    ("train/tokens_per_second", "Tokens a second", "of training"),
)


def curves(runs: Sequence[Run], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A panel for each metric that was logged: `id`, `title`, `unit`, and a series for each group that has it.

    A series is `group` (its index), `steps`, and at every step over the group's seeds `mean`, `low`, `high` and `runs` (how
    many had logged it). Long ones are averaged down to `POINTS` points.
    """
    panels = []
    heads = max(run.heads for run in runs)
    for metric, title, unit in PANELS:
        for k in range(heads) if "{k}" in metric else [0]:
            name = metric.format(k=k)
            series = [_curve([runs[member].rows for member in group.members], name) for group in groups]
            found = [{"group": number, **one} for number, one in enumerate(series) if one]
            if found:
                panels.append({"id": name, "title": title.format(k=k), "unit": unit, "series": found})
    return panels


def depth_charts(runs: Sequence[Run], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Charts over heads, and acceptance over drafted tokens: as `curves`, with `labels` of the x axis and `x` for steps.

    Cross-entropy comes from the last evaluation of the training; the others from `evaluate`, and are left out where no run
    has them.
    """

    def of_training(run: Run) -> list[float]:
        last = next((row for row in reversed(run.rows) if "eval/ce_head_0" in row), {})
        return [last[f"eval/ce_head_{k}"] for k in range(run.heads) if f"eval/ce_head_{k}" in last]

    def of_heads(name: str):
        return lambda run: [head[name] for head in run.evaluation.get("heads", {}).get("heads", [])]

    def accepted(run: Run) -> list[float]:
        return (run.evaluation.get("speed", {}).get("acceptance") or {}).get("by_depth", [])

    charts = (
        ("ce", "Cross-entropy by head", "nats a token, held out, at the end of training", "head {}", of_training),
        ("top1", "Top-1 accuracy by head", "share of tokens, held out", "head {}", of_heads("top1")),
        ("top5", "Top-5 accuracy by head", "share of tokens, held out", "head {}", of_heads("top5")),
        ("ece", "Calibration error by head", "expected; 0: confidence is accuracy", "head {}", of_heads("ece")),
        ("acceptance", "Acceptance by depth", "share of drafts accepted, self-speculative decoding", "draft {}", accepted),
    )
    result = []
    for identity, title, unit, label, read in charts:
        first = 1 if identity == "acceptance" else 0
        series = []
        for number, group in enumerate(groups):
            values = [one for member in group.members if (one := read(runs[member])) and np.isfinite(one).all()]
            if values:
                depth = min(map(len, values))
                table = np.array([one[:depth] for one in values], np.float64)
                series.append({"group": number, "x": list(range(first, first + depth)), **_spread_of(table)})
        if series:
            result.append({"id": identity, "title": title, "unit": unit, "label": label, "series": series})
    return result


def kind_accuracy(runs: Sequence[Run], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Top-1 accuracy by kind of token from `evaluate`: for every head a list of `kind` and, by group, the mean over seeds
    (None: not measured)."""
    found = [[run.evaluation.get("heads", {}).get("heads", []) for run in runs]]
    result = []
    for k in range(max((len(heads) for heads in found[0]), default=0)):
        table = [heads[k]["kinds"] if k < len(heads) else {} for heads in found[0]]
        names = list(dict.fromkeys(name for kinds in table for name in kinds))
        rows = []
        for name in names:
            means = []
            for group in groups:
                values = [table[member][name]["top1"] for member in group.members if name in table[member]]
                means.append(round(float(np.mean(values)), 4) if values else None)
            rows.append({"kind": name, "top1": means})
        result.append({"head": k, "kinds": rows})
    return result


def _curve(rows: Iterable[list[dict[str, Any]]], name: str) -> dict[str, Any] | None:
    points: dict[int, list[float]] = {}
    for lines in rows:
        for row in lines:
            if name in row and np.isfinite(row[name]):
                points.setdefault(row["step"], []).append(float(row[name]))
    if not points:
        return None
    steps = np.array(sorted(points))
    table = np.array([[np.mean(points[s]), min(points[s]), max(points[s]), len(points[s])] for s in steps.tolist()])
    bins = np.array_split(np.arange(len(steps)), min(len(steps), POINTS))
    table = np.array([table[part].mean(axis=0) for part in bins])
    # The first and last points stay where they are: a curve begins and ends at a step that was logged.
    shown = [int(steps[part].mean().round()) for part in bins]
    shown[0], shown[-1] = int(steps[0]), int(steps[-1])
    mean, low, high, count = table.T
    return {"steps": shown, "mean": _short(mean), "low": _short(low), "high": _short(high), "runs": int(count.max())}


def _spread_of(table: np.ndarray) -> dict[str, Any]:
    """Over the first axis."""
    return {
        "mean": _short(table.mean(axis=0)),
        "low": _short(table.min(axis=0)),
        "high": _short(table.max(axis=0)),
        "runs": len(table),
    }


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
