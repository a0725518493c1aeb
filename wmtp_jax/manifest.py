"""What makes a checkpoint count: a list of its files with sizes and checksums, written last, and their check before it is used.

The same file is the commit marker here and in object storage: a checkpoint without it was cut off, one that differs from it is
damaged. Either is left for the one before.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
FORMAT = 1
_PIECE = 1 << 20


def checksum(path: Path) -> str:
    """CRC-32 of a file; about a second a gigabyte, in 1 MiB of memory and without the interpreter's lock."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


def make_manifest(directory: Path, step: int, *, metrics: Mapping[str, float] | None, policy: Mapping[str, Any]) -> bytes:
    """The manifest of a complete directory.

    Args:
      directory: of the checkpoint.
      step: that it is of.
      metrics: of the evaluation of this state, if there was one.
      policy: `keep_last` and `best_metric`, by which old ones are removed from object storage too.
    """
    files = {
        name: {"size": (directory / name).stat().st_size, "crc32": checksum(directory / name)}
        for name in file_names(directory)
    }
    content = {"format": FORMAT, "step": step, "metrics": dict(metrics or {}), "policy": dict(policy), "files": files}
    text = json.dumps(content, indent=1)
    return json.dumps({"crc32": f"{zlib.crc32(text.encode()):08x}", "manifest": text}).encode() + b"\n"


def write_manifest(directory: Path, content: bytes) -> None:
    """Puts the manifest in its place, whole or not at all, through to the disk."""
    temporary = directory / f".{MANIFEST}.tmp"
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / MANIFEST)


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
    for name, wanted in content["files"].items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {wanted['size']}"
        if checksum(path) != wanted["crc32"]:
            return f"{name} holds other bytes than were written"
    return ""


def file_names(directory: Path) -> list[str]:
    """Names of the files of a checkpoint, the manifest aside."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in paths if path not in (MANIFEST, f".{MANIFEST}.tmp"))
