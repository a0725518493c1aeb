"""The directory of one run: who may write to it, and whether what is there belongs to the run that wants to go on."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.checkpoint.manifest import MANIFEST
from wmtp_jax.errors import UserError
from wmtp_jax.parallel.processes import Processes
from wmtp_jax.settings import Configuration, flatten, stored_keys
from wmtp_jax.storage import files, s3
from wmtp_jax.storage.redact import redacted

CHECKPOINTS = "checkpoints"
# What may differ between a run and its continuation: how long, how often, where. All else would make it another run.
FREE_KEYS = (
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.nonfinite_limit",
    "train.accumulation",
    "train.profile",
    "data.cache_dir",
    "data.prefetch",
    "mesh.",
    "eval.",
    "checkpoint.",
    "tracking.",
    "critic.stop_after",
    "critic.allow_unexplained",
)
# What a run writes, and --resume=never replaces.
OUTPUTS = (".upload", "checkpoints", "config.json", "curves.png", "damaged", "evaluation", "metrics.jsonl", "mirror.json",
           "mlflow.json", "nonfinite", "profile", "reference", "report", "summary.json", "system.jsonl", "tokenizer", "tokens",
           "tracking.jsonl", "trunk", "value")  # fmt: skip


@contextmanager
def locked(directory: Path, *, flag: str = "--workdir") -> Iterator[None]:
    """Makes the directory and holds it for this process; the lock goes with the process, however it ends.

    Args:
      flag: what names the directory, for messages.

    Raises:
      UserError: another process holds it, or it can't be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}={directory}: {error.strerror.lower()}; choose another directory") from error  # pyrefly: ignore[missing-attribute]
    with ExitStack() as stack:
        try:
            held = stack.enter_context(files.locked(directory / ".lock", wait=False))
        except BlockingIOError as error:
            raise UserError(f"{flag}={directory}: another run is writing here; choose another directory") from error
        except OSError as error:
            raise UserError(f"{flag}={directory}: {error.strerror.lower()}; choose another directory") from error  # pyrefly: ignore[missing-attribute]
        if not held:
            print(f"{directory}: its file system has no locks; see to it that no other run writes there", file=sys.stderr)
        yield


def check_shared(directory: Path, processes: Processes) -> None:
    """Returns, in every process, when the first one has done with the directory.

    Raises:
      UserError: another process does not see what the first one wrote.
    """
    sign = directory / ".processes"
    if processes.count > 1 and processes.first:
        sign.write_text(f"{time.time_ns()}\n")
    processes.barrier("directory")
    told = processes.tell(sign.read_text() if processes.count > 1 and processes.first else "")
    if processes.count > 1 and (not sign.is_file() or sign.read_text() != told):
        raise UserError(
            f"--workdir={directory}: process {processes.index} does not see what process 0 wrote there; name a directory on a "
            "disk that all hosts share"
        )


def clear(directory: Path) -> bool:
    """Removes what an earlier run wrote; whether there was anything."""
    found = [directory / name for name in OUTPUTS if (directory / name).exists()]
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return bool(found)


def adopt(checkpoint: Path, directory: Path) -> bool:
    """Makes `directory` go on from a checkpoint of another run: copies it, its run's metrics and the runs of its stages.

    Does nothing where `directory` has a checkpoint already, so that the same command goes on from there. The other run is
    only read.

    Returns:
      Whether it was adopted.

    Raises:
      UserError: the checkpoint's directory is not named by its step.
    """
    target = directory / CHECKPOINTS
    if target.is_dir() and any(path.name.isdigit() for path in target.iterdir()):
        return False
    if not checkpoint.name.isdigit():
        raise UserError(f"--resume={checkpoint}: a checkpoint's directory is named by its step; give it that name")
    source = checkpoint.parent.parent
    for stage in ("reference", "trunk", "value"):
        if (source / stage).is_dir() and not (directory / stage).exists():
            shutil.copytree(source / stage, directory / f".{stage}.tmp", dirs_exist_ok=True)
            (directory / f".{stage}.tmp").rename(directory / stage)
    if (source / "metrics.jsonl").is_file():
        shutil.copyfile(source / "metrics.jsonl", directory / "metrics.jsonl")
    target.mkdir(exist_ok=True)
    # Last, and by a rename: an interrupted copy leaves no checkpoint, and is made again.
    partial = target / f"{checkpoint.name}.partial"
    shutil.copytree(checkpoint, partial, dirs_exist_ok=True)
    partial.rename(target / checkpoint.name)
    return True


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path stands for: itself, or the newest complete one of a run directory. One in object storage is
    fetched, with what belongs to its run.

    Raises:
      UserError: there is none.
    """
    path = s3.local(path)
    if (path / "parameters").is_dir():
        return path
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / MANIFEST).is_file()]
    if not steps:
        raise UserError(f"{path}: no checkpoint here; give a run directory or a checkpoint (RUN/{CHECKPOINTS}/STEP)")
    return folder / str(max(steps))


def plain(config: Configuration) -> dict[str, Any]:
    """The tree as JSON values (tuples become lists), without passwords: it is written to files that are passed on."""
    return redacted(json.loads(json.dumps(dataclasses.asdict(config))))


def check_continues(config: Configuration, stored: dict[str, Any], where: Path) -> None:
    """Refuses to continue a run under a configuration that would make it another one.

    What an older run began its texts with is no key of its own: its tokenizer decides that, and is compared itself.

    Raises:
      UserError: names the first key that differs, with both values.
    """
    before = stored_keys(stored) | ({} if "bos" in stored["data"] else {"data.bos": config.data.bos})
    for key, now in flatten(plain(config)):
        if key.startswith(FREE_KEYS) or before[key] == now:
            continue
        raise UserError(
            f"{where}: was made with config.{key} = {before[key]!r}, not {now!r}; set it back, choose another --workdir, or "
            "start anew with --resume=never"
        )


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that a reader sees the old one or the new one, never a part."""
    files.write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes an .npz file, its folder included, so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, **{name: np.asarray(value) for name, value in arrays.items()})
    files.write_whole(path, content.getvalue())
