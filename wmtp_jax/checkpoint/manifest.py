"""What makes a checkpoint count: a list of its files with sizes and checksums, written last, and their check before it is used.

The same file is the commit marker here and in object storage: a checkpoint without it was cut off, one that differs from it is
damaged. Either is left for the one before.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.storage.files import sync, write_whole
from wmtp_jax.storage.long_work import LongWork

MANIFEST = "MANIFEST.json"
DAMAGED = "damaged"
FORMAT = 1
_PIECE = 1 << 20


def checksum(path: Path) -> str:
    """CRC-32 of a file; about a second a gigabyte, in 1 MiB of memory and without the interpreter's lock."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


def seal(
    directory: Path, step: int, *, metrics: Mapping[str, float] | None = None, keep_last: int = 1, best_metric: str = ""
) -> None:
    """Writes the manifest of a directory that is complete, whole or not at all, through to the disk.

    Args:
      directory: of the checkpoint.
      step: that it is of.
      metrics: of the evaluation of this state, if there was one.
      keep_last, best_metric: by which old ones are removed from object storage, too.
    """
    files = {}
    for name in file_names(directory):
        path = directory / name
        sync(path)
        files[name] = {"size": path.stat().st_size, "crc32": checksum(path)}
    policy = {"keep_last": keep_last, "best_metric": best_metric}
    content = {"format": FORMAT, "step": step, "metrics": dict(metrics or {}), "policy": policy, "files": files}
    text = json.dumps(content)
    outer = {"crc32": f"{zlib.crc32(text.encode()):08x}", "manifest": text}
    write_whole(directory / MANIFEST, json.dumps(outer).encode())


def parse_manifest(content: bytes) -> dict[str, Any]:
    """What a manifest says.

    Raises:
      ValueError: it is none, or damaged; tells how.
    """
    try:
        outer = json.loads(content)
        text = outer["manifest"]
        if outer["crc32"] != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError(f"{MANIFEST} holds other bytes than were written")
        inner = json.loads(text)
        if inner["format"] != FORMAT:
            raise ValueError(f"{MANIFEST} is of format {inner['format']}, not {FORMAT}")
        return inner
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{MANIFEST} is no manifest") from error


def problem(directory: Path) -> str:
    """What is wrong with a checkpoint; "" where every byte is as it was written."""
    try:
        content = parse_manifest((directory / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"it was cut off: {MANIFEST} is missing"
    except ValueError as error:
        return str(error)
    if str(content["step"]) != directory.name.removesuffix(".partial"):
        return f"{MANIFEST} is of step {content['step']}"
    total = sum(wanted["size"] for wanted in content["files"].values())
    with LongWork(f"checking {directory}", total=total / 1e6, unit="MB") as work:
        for name, wanted in content["files"].items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {wanted['size']}"
            if checksum(path) != wanted["crc32"]:
                return f"{name} holds other bytes than were written"
            work.done += wanted["size"] / 1e6
    return ""


def file_names(directory: Path) -> list[str]:
    """Names of the files of a checkpoint, the manifest aside."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != MANIFEST and not path.startswith(f".{MANIFEST}."))


def settle(checkpoints: Path, *, elsewhere: bool = False) -> int | None:
    """Leaves, as the newest, a checkpoint of which every byte is as it was written; newer ones are moved to `damaged/` of the
    run, and said so.

    Args:
      checkpoints: the folder of a run's checkpoints, which nobody else writes to.
      elsewhere: there are others in object storage.

    Returns:
      its step; None where there is none, and none was ever complete.

    Raises:
      UserError: all that were complete are damaged.
    """
    steps = sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())
    wrong, newest = {}, None
    for step in reversed(steps):
        if not (found := problem(checkpoints / str(step))):
            newest = step
            break
        wrong[step] = found
    # Before the first checkpoint was complete, one may have been cut off.
    first_cut_off = len(steps) == 1 and not (checkpoints / str(steps[0]) / MANIFEST).exists()
    if wrong and newest is None and not first_cut_off and not elsewhere:
        told = "; ".join(f"step {step}: {found}" for step, found in wrong.items())
        raise UserError(f"{checkpoints}: no checkpoint is whole ({told}); start anew with --resume=never, or put one back")
    for step, found in wrong.items():
        target = checkpoints.parent / DAMAGED / str(step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.move(checkpoints / str(step), target)  # to another disk, where checkpoints/ is a link
        print(f"checkpoint of step {step} is left out: {found} (moved to {target})", file=sys.stderr, flush=True)
    return newest
