"""A directory of things made once: built beside their place, renamed when complete, one builder at a time."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from wmtp_jax.storage import files
from wmtp_jax.storage.long_work import LongWork

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
    with _lock(directory, wait=True) as held:
        if directory.is_dir():
            return
        if held:
            for left in directory.parent.glob("*" + _PARTIAL):
                _remove_abandoned(left, held=left == partial)
        else:
            # A file system without locks: each process builds its own, and the first that is done has it.
            partial = partial.with_name(f"{secrets.token_hex(4)}-{partial.name}")
        try:
            partial.mkdir()
            build(partial)
            for path in partial.rglob("*"):
                files.sync(path)
            try:
                partial.rename(directory)
            except OSError:
                if held or not directory.is_dir():
                    raise
            files.sync(directory.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file as a whole, its directory included; see `files.write_whole`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, content)


@contextlib.contextmanager
def _lock(directory: Path, *, wait: bool) -> Iterator[bool]:
    """The right to build `directory`, given up with the process however it ends; yields whether it was to be had: not where
    another process has it, nor on a file system without locks."""
    lock = directory.with_name(f".{directory.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(files.locked(lock, wait=False))
        except BlockingIOError:
            if not wait:
                yield False
                return
            with LongWork(f"waiting for another process that is making {directory}"):
                held = stack.enter_context(files.locked(lock, wait=True))
        yield held


def _remove_abandoned(partial: Path, *, held: bool) -> None:
    """Removes what a dead builder left; a lock that is to be had says that it is dead."""
    with contextlib.nullcontext(True) if held else _lock(Path(str(partial).removesuffix(_PARTIAL)), wait=False) as free:
        if free:
            shutil.rmtree(partial)
