"""What the report reads of a run directory, and which runs are seeds of one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.settings import flatten, stored_keys
from wmtp_jax.storage import s3
from wmtp_jax.tracking.metrics_file import METRICS_FILE, read_metrics

# Two runs that differ in these alone are seeds of one another: where things lie, how often they are written.
_SAME_EXPERIMENT = ("train.seed", "train.log_every", "data.cache_dir", "data.prefetch", "eval.", "checkpoint.", "tracking.")
_EVALUATIONS = ("likelihood", "heads", "speed")


@dataclass(frozen=True)
class Run:
    """A run as far as it has been written.

    Attributes:
      path: its directory.
      name: what tells it from the other runs of the report.
      config: of config.json, flat: "train.seed" -> 0; keys that are newer than the run at their defaults.
      rows: of metrics.jsonl, those that a resume overtook left out.
      token_files: step -> tokens/STEP.npz, steps increasing.
      evaluation: of its newest evaluation, by the name of the file.
      missing: what is not there, in words.
    """

    path: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    token_files: dict[int, Path]
    evaluation: dict[str, dict[str, Any]]
    missing: tuple[str, ...]

    @property
    def algorithm(self) -> str:
        name = self.config["weighting.algorithm"]
        return f"{name} (permuted)" if self.config["weighting.permute"] else name

    @property
    def seed(self) -> int:
        return self.config["train.seed"]

    @property
    def heads(self) -> int:
        return self.config["model.heads.count"]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
      label: the algorithm, and what else tells the group from others of this algorithm.
      members: indices of runs.
    """

    label: str
    members: tuple[int, ...]


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in these directories; one in object storage (`s3://...`) is fetched, its checkpoints left there.

    Raises:
      UserError: one of them is no run, one of its files is damaged, or there is nothing to show yet; names it.
    """
    directories = [s3.outputs(path) for path in paths]
    seen: dict[Path, Path] = {}
    for directory in directories:
        if (whole := directory.absolute().resolve()) in seen:
            raise UserError(f"{directory}: the same run as {seen[whole]}; name each once")
        seen[whole] = directory
    runs = [_read_run(path, name) for path, name in zip(directories, _names(directories), strict=True)]
    if not any(run.rows or run.token_files for run in runs):
        raise UserError(f"{runs[0].path}: nothing to show yet ({', '.join(runs[0].missing)}); train on, then report again")
    return runs


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups of runs in the order of their first ones."""
    members: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        decisive = {key: value for key, value in run.config.items() if not key.startswith(_SAME_EXPERIMENT)}
        members.setdefault(json.dumps(decisive, sort_keys=True), []).append(number)
    firsts = [runs[numbers[0]] for numbers in members.values()]
    return [Group(_label(runs[numbers[0]], firsts), tuple(numbers)) for numbers in members.values()]


def _label(run: Run, firsts: Sequence[Run]) -> str:
    alike = [other for other in firsts if other.algorithm == run.algorithm]
    keys = [
        key
        for key, value in run.config.items()
        if not key.startswith(_SAME_EXPERIMENT) and any(other.config.get(key) != value for other in alike)
    ]
    if not keys:
        return run.algorithm
    told = ", ".join(f"{key.rpartition('.')[2]} {run.config[key]}" for key in keys[:3])
    return f"{run.algorithm} ({told}{', …' if len(keys) > 3 else ''})"


def _names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [directory.absolute().parts for directory in directories]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(directory.absolute()) for directory in directories]


def _read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the directory of a run (its --workdir)")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: not a run directory: it has no config.json; give a run's --workdir")
    given = _read_json(path / "config.json")
    config = stored_keys(given)
    for key in ("weighting.algorithm", "train.seed", "model.heads.count"):
        if key not in dict(flatten(given)):
            raise UserError(f"{path / 'config.json'}: no {key} in it; this is not a run of WMTP")
    missing = []
    rows = _newest(read_metrics(path / METRICS_FILE)) if (path / METRICS_FILE).is_file() else []
    if not rows:
        missing.append(f"no {METRICS_FILE}" if not (path / METRICS_FILE).is_file() else f"nothing in {METRICS_FILE}")
    files = {int(file.stem): file for file in (path / "tokens").glob("*.npz") if file.stem.isdigit()}
    if not files:
        missing.append("no tokens/STEP.npz")
    evaluation = _read_evaluation(path / "evaluation")
    missing += [f"no evaluation of {name}" for name in ("heads", "speed") if name not in evaluation]
    return Run(path, name, config, rows, dict(sorted(files.items())), evaluation, tuple(missing))


def _newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a step: where a run was resumed, what its newer lines overtook is left out."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _read_evaluation(directory: Path) -> dict[str, dict[str, Any]]:
    """The results of the newest checkpoint that was evaluated, by name."""
    steps = sorted((int(path.name) for path in directory.glob("*") if path.name.isdigit()), reverse=True)
    for step in steps:
        files = {name: directory / str(step) / f"{name}.json" for name in _EVALUATIONS}
        if found := {name: _read_json(file) for name, file in files.items() if file.is_file()}:
            return found
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error}); restore it, or report without this run") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; restore it, or report without this run")
    return value
