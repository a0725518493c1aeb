"""A directory of things made once: built beside their place, renamed when complete, one builder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_log = logging.getLogger(__name__)
_PARTIAL = ".partial"


def cache_directory(configured: str = "") -> Path:
    """`configured`, or where it is empty `$XDG_CACHE_HOME/wmtp` or `~/.cache/wmtp`; who writes first makes it."""
    if configured:
        return Path(configured).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wmtp"


def make_once(directory: Path, build: Callable[[Path], None]) -> None:
    """Makes sure that `directory` is there and complete: `build(partial)` fills it under another name.

    A process that finds another one building waits for it. What an interrupted build left is removed, by the process
    itself where it can, else by the next builder beside it.
    """
    if directory.is_dir():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(directory.name + _PARTIAL)
    with _lock(directory, wait=True):
        if directory.is_dir():
            return
        for left in directory.parent.glob("*" + _PARTIAL):
            _remove_abandoned(left, held=left == partial)
        try:
            partial.mkdir()
            build(partial)
            for path in partial.rglob("*"):
                sync(path)
            partial.rename(directory)
            sync(directory.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(directory: Path, *, wait: bool) -> Iterator[bool]:
    """The right to build `directory`, given up with the process however it ends; yields whether it was to be had."""
    descriptor = os.open(directory.with_name(f".{directory.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            _log.info("waiting for another process that is making %s", directory)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(descriptor)


def _remove_abandoned(partial: Path, *, held: bool) -> None:
    """Removes what a dead builder left; a lock that is to be had says that it is dead."""
    with contextlib.nullcontext(True) if held else _lock(Path(str(partial).removesuffix(_PARTIAL)), wait=False) as free:
        if free:
            shutil.rmtree(partial)


def sync(path: Path) -> None:
    """Has the disk hold what was written to a file, or which names a directory has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
