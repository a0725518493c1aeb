"""`study.json`: what was declared, what the runs gave, and what follows from it; made again from the committed files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.study import statistics
from wmtp_jax.study.declaration import EVALUATIONS
from wmtp_jax.study.directory import Directory
from wmtp_jax.study.jobs import FAILED, RESULTS, SUMMARY
from wmtp_jax.tracking.metrics_file import METRICS_FILE, rows_of

FILE = "study.json"
AGAINST = ("baseline", "permuted", "compute")

Rows = list[dict[str, Any]]


def figures_of(summary: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The split that a finished run's figures are of, and the figures by name without its prefix: of the test split, or where
    there was none of the last evaluation."""
    if summary.get("test"):
        return "test", dict(summary["test"])
    return "validation", validation_figures(summary)


def validation_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the last evaluation on validation."""
    after = summary.get("after", {})
    return {name.removeprefix("eval/"): value for name, value in after.items() if name.startswith("eval/")}


def value_of(metric: Mapping[str, Any], summary: Mapping[str, Any], rows: Rows) -> float | None:
    """The metric of a finished run; None where it is not finite.

    Args:
      metric: `name` and `over`, see `declaration.Study`.
      rows: of its metrics.jsonl, all evaluations included.

    Raises:
      KeyError: the run wrote no such metric.
    """
    if metric["over"] == EVALUATIONS:
        name = f"eval/{metric['name']}"
        found = [row[name] for row in rows if name in row]
        if not found:
            raise KeyError(name)
        value = sum(found) / len(found)
    else:
        value = figures_of(summary)[1][metric["name"]]
    return float(value) if math.isfinite(value) else None


def read_run(directory: Directory, folder: str) -> tuple[dict[str, Any], Rows] | None:
    """The summary and the lines of a finished run that was kept; None where it is not finished."""
    content = directory.read(f"{folder}/{SUMMARY}")
    if content is None:
        return None
    try:
        summary = json.loads(content)
    except ValueError as error:
        raise UserError(
            f"{directory.address}/{folder}/{SUMMARY}: is damaged ({error}); restore or remove it"
        ) from error
    lines = directory.read(f"{folder}/{METRICS_FILE}") or b""
    return summary, [row for row, _ in rows_of(lines, Path(f"{folder}/{METRICS_FILE}"))[0]]


def read_study(directory: Directory) -> dict[str, Any] | None:
    """`study.json`; None where there is none.

    Raises:
      UserError: it is damaged.
    """
    content = directory.read(FILE)
    if content is None:
        return None
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{directory.address}/{FILE}: is damaged ({error}); restore it") from error


def write_study(directory: Directory, study: Mapping[str, Any]) -> None:
    directory.write(FILE, json.dumps(study, indent=1).encode() + b"\n")


def fill(study: dict[str, Any], directory: Directory) -> dict[str, Any]:
    """The study with what its kept runs give: values, comparisons and verdicts.

    Args:
      study: `study.json`, of which what was declared is read.

    Raises:
      UserError: a run wrote no such metric, or runs of different splits, programs or corpora lie there.
    """
    metric, arms = study["metric"], study["arms"]
    splits, machines, dates, commits = set(), {}, [], []
    for name, arm in arms.items():
        arm |= {"values": [], "failed": {}, "beside": {other: [] for other in study["beside"]}, "seconds": []}
        for seed in arm["seeds"]:
            folder = f"{RESULTS}/{name}-{seed}"
            found = read_run(directory, folder)
            value, beside, seconds = None, {}, None
            if found is not None:
                summary, rows = found
                value = _value(metric, summary, rows, f"{directory.address}/{folder}")
                split, beside = figures_of(summary)
                facts, seconds = summary["study"], summary["study"]["seconds"]
                splits.add(split)
                dates.append(facts["date"])
                commits.append(facts["commit"])
                key = json.dumps(facts["machine"], sort_keys=True)
                machines.setdefault(key, []).append(f"{name}-{seed}")
            elif (reason := directory.read(f"{folder}/{FAILED}")) is not None:
                arm["failed"][str(seed)] = json.loads(reason)["reason"]
            arm["values"].append(value)
            arm["seconds"].append(seconds)
            for other, values in arm["beside"].items():
                values.append(beside.get(other))
    if len(splits) > 1:
        raise UserError(
            f"{directory.address}/{RESULTS}: some runs had a test split, some had none; remove those of one kind"
        )
    study["metric"]["split"] = "evaluations" if metric["over"] == EVALUATIONS else next(iter(splits), None)
    study["machines"] = [{**json.loads(key), "runs": runs} for key, runs in machines.items()]
    study["dates"] = [min(dates), max(dates)] if dates else []
    study["commits"] = sorted(set(commits))
    _compare(study)
    return study


def _value(metric: Mapping[str, Any], summary: Mapping[str, Any], rows: Rows, where: str) -> float | None:
    try:
        return value_of(metric, summary, rows)
    except KeyError as error:
        known = ", ".join(figures_of(summary)[1])
        raise UserError(f"metric {metric['name']!r}: {where} has no such figure; it has {known}") from error


def _compare(study: dict[str, Any]) -> None:
    arms, metric = study["arms"], study["metric"]
    tested = [name for name, arm in arms.items() if arm["control_of"] is None and arm["baseline"] != name]
    for arm in arms.values():
        arm["against"], arm["verdict"] = {}, None
    for kind in AGAINST:
        pairs = {name: other for name in tested if (other := arms[name]["controls"].get(kind))}
        found = statistics.compare_arms([differences(arms[name], arms[other]) for name, other in pairs.items()])
        for name, comparison in zip(pairs, found, strict=True):
            if comparison is not None:
                arms[name]["against"][kind] = comparison._asdict()
            if kind == "baseline":
                settings = {
                    "lower_is_better": metric["lower_is_better"],
                    "difference": study["difference_that_matters"],
                }
                arms[name]["verdict"] = statistics.verdict(comparison, **settings)


def differences(arm: Mapping[str, Any], other: Mapping[str, Any], *, beside: str | None = None) -> list[float]:
    """Of the seeds that both have, the arm minus the other.

    Args:
      beside: a metric beside the study's own; None: its own.
    """

    def values(one: Mapping[str, Any]) -> dict[int, float | None]:
        return dict(zip(one["seeds"], one["values"] if beside is None else one["beside"][beside], strict=True))

    mine, theirs = values(arm), values(other)
    pairs = [(value, theirs.get(seed)) for seed, value in mine.items()]
    return [value - against for value, against in pairs if value is not None and against is not None]


def progress(study: Mapping[str, Any]) -> tuple[int, int, int]:
    """Runs that are finished, have failed, and are wanted."""
    finished = failed = wanted = 0
    for arm in study["arms"].values():
        finished += sum(value is not None for value in arm["values"])
        failed += len(arm["failed"])
        wanted += len(arm["seeds"])
    return finished, failed, wanted


def chosen_try(values: Sequence[Sequence[float | None]], *, lower_is_better: bool) -> int | None:
    """The try with the best mean over its seeds, the first of equal ones; one of whose seeds is missing is not chosen, and None
    where all are so.

    Args:
      values: on validation, by try and seed.
    """
    means = {
        number: sum(found) / len(row)
        for number, row in enumerate(values)
        if len(found := [value for value in row if value is not None]) == len(row)
    }
    if not means:
        return None
    return min(means, key=lambda number: means[number] if lower_is_better else -means[number])
