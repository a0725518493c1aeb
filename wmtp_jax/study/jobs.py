"""The runs of a study as commands of the trainer, and what is kept of a finished one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_jax.checkpoint.manifest import MANIFEST, parse_manifest, seal
from wmtp_jax.checkpoint.parameters import FILE as PARAMETERS
from wmtp_jax.checkpoint.run_directory import CHECKPOINTS, find_checkpoint, write_json
from wmtp_jax.errors import UserError
from wmtp_jax.storage import s3
from wmtp_jax.study import configuration
from wmtp_jax.study.declaration import SHARED
from wmtp_jax.study.directory import Directory
from wmtp_jax.tracking.metrics_file import METRICS_FILE, rows_of

RESULTS, TRIES, CHECKS, SHARED_RUNS, SCORES = "results", "tries", "checks", "shared", "scores"
SUMMARY, FAILED = "summary.json", "failed.json"
TRAINERS = {"jax": "wmtp_jax.main", "torch": "wmtp_torch.main"}
SCORER = "wmtp_jax.score"
# Lines of metrics.jsonl that are kept besides those of evaluations.
_LINES = 100


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      kind: results, tries, checks, shared: the folder of what is kept of it; scores, of which the cache keeps what counts.
      name: of the run, ARM-SEED for results.
      arm: that it is of, or the shared run.
      seed: its `train.seed`; None: the recipe's.
      overrides: of the recipe, with `shared:NAME` for directories of shared runs.
      identity: what its figures depend on: hashes of `program`, `configuration` and `corpus`.
      operations: of this run alone.
      steps: updates that it makes.
    """

    kind: str
    name: str
    arm: str
    seed: int | None
    overrides: Mapping[str, Any]
    identity: Mapping[str, str]
    operations: float
    steps: int

    @property
    def output(self) -> str:
        """The folder of what is kept, below the study's directory."""
        return f"{self.kind}/{self.name}"

    @property
    def directory(self) -> str:
        """The run's own, below `runs/`: runs of another program, configuration or corpus have another."""
        return f"{self.kind}-{self.name}.{''.join(value[:4] for value in self.identity.values())}"


def command(job: Job, *, recipe: str, backend: str, study: str, address: str, scratch: Path) -> list[str]:
    """The arguments of a run's process.

    Args:
      recipe: `configs/NAME.py[:TARGET]`.
      backend: jax or torch.
      study: its name.
      address: of the study's directory, local or in object storage.
      scratch: the local directory of the study.
    """
    settings = {key: _placed(value, address) for key, value in job.overrides.items()}
    if job.seed is not None:
        settings["train.seed"] = job.seed
    if job.kind == SCORES:
        return [sys.executable, "-m", SCORER, f"--config={recipe}", *configuration.flags(settings)]
    # Forty models of a study are no forty versions of a model.
    settings = {"tracking.sweep": study, "tracking.model": "", **settings}
    if s3.is_remote(address):
        settings["checkpoint.remote"] = s3.join(address, "runs", job.directory)
    place = [f"--workdir={scratch / 'runs' / job.directory}", f"--run_name={job.name}", f"--tags=arm={job.arm}"]
    return [sys.executable, "-m", TRAINERS[backend], f"--config={recipe}", *place, *configuration.flags(settings)]


def _placed(value: Any, address: str) -> Any:
    """A value with the directory that `shared:NAME` stands for."""
    if not isinstance(value, str) or not value.startswith(SHARED):
        return value
    name = f"{SHARED_RUNS}/{value.removeprefix(SHARED)}"
    return s3.join(address, name) if s3.is_remote(address) else str(Path(address) / name)


def keep(job: Job, run: Path, directory: Directory, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Puts what is kept of a finished run into the study's directory, its summary last: a run that has one is finished.

    Args:
      run: its directory.
      facts: what the summary says under `study`.

    Returns:
      the summary.

    Raises:
      UserError: the run found other data than the study did.
    """
    path = run / SUMMARY
    summary = json.loads(path.read_bytes()) if path.exists() else {}
    corpus = summary.get("corpus", job.identity["corpus"])
    if not corpus.startswith(job.identity["corpus"]):
        raise UserError(
            f"{run}: its corpus is {corpus[:16]}, the study's was {job.identity['corpus']}: files of data.sources have changed "
            "since the study began; put them back, or start anew in another --workdir"
        )
    if job.kind == SHARED_RUNS:
        _keep_models(job, run, directory)
    summary["study"] = {**facts, **_speed(run)}
    if (run / METRICS_FILE).exists():
        directory.write(f"{job.output}/{METRICS_FILE}", thinned((run / METRICS_FILE).read_bytes(), run / METRICS_FILE))
    directory.write(f"{job.output}/{SUMMARY}", json.dumps(summary, indent=1).encode() + b"\n")
    return summary


def thinned(content: bytes, path: Path) -> bytes:
    """The lines of a metrics.jsonl that have an evaluation, the last one, and about `_LINES` of the others, evenly spread."""
    rows, _ = rows_of(content, path)
    every = max(1, -(-len(rows) // _LINES))
    kept = []
    for number, (row, raw) in enumerate(rows):
        is_evaluation = any(name.startswith("eval/") for name in row)
        if is_evaluation or number % every == 0 or number == len(rows) - 1:
            kept.append(raw)
    return b"".join(kept)


def _speed(run: Path) -> dict[str, Any]:
    """Seconds that the updates took: their tokens over the median rate, which neither interruptions nor evaluations change."""
    path = run / METRICS_FILE
    rows = [row for row, _ in rows_of(path.read_bytes(), path)[0]] if path.exists() else []
    rates = sorted(row["train/tokens_per_second"] for row in rows if row.get("train/tokens_per_second"))
    if not rates or not (run / "config.json").exists():
        return {"tokens_per_second": None, "seconds": None}
    config = json.loads((run / "config.json").read_bytes())
    tokens = max(row["step"] for row in rows) * config["train"]["batch_size"] * config["data"]["sequence_length"]
    rate = rates[len(rates) // 2]
    return {"tokens_per_second": rate, "seconds": tokens / rate}


def _keep_models(job: Job, run: Path, directory: Directory) -> None:
    """The parameters of a shared run and of its stages, without what only a resume reads, with tokenizer and configuration."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for stage in (run, *(run / name for name in ("reference", "trunk", "value"))):
            if not (stage / CHECKPOINTS).is_dir():
                continue
            target = copy / stage.relative_to(run)
            target.mkdir(exist_ok=True)
            newest = find_checkpoint(stage)
            facts = json.loads((stage / SUMMARY).read_bytes())
            for step in {newest.name, str(facts["best_step"] or newest.name)}:
                source = newest.parent / step
                if (source / MANIFEST).exists():
                    _slim(source, target / CHECKPOINTS / step)
            shutil.copytree(stage / "tokenizer", target / "tokenizer")
            shutil.copyfile(stage / "config.json", target / "config.json")
            write_json(target / SUMMARY, facts)
        files = {path.relative_to(copy).as_posix(): path for path in sorted(copy.rglob("*")) if path.is_file()}
        # The shared run's own summary says that it is finished.
        directory.put({f"{job.output}/{name}": path for name, path in files.items() if name != SUMMARY})


def _slim(checkpoint: Path, target: Path) -> None:
    (target / PARAMETERS).parent.mkdir(parents=True)
    shutil.copyfile(checkpoint / PARAMETERS, target / PARAMETERS)
    manifest = parse_manifest((checkpoint / MANIFEST).read_bytes())
    seal(target, manifest["step"], metrics=manifest["metrics"], **manifest["policy"])
