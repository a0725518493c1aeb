"""Files on file systems of any kind: locks, hard links, moves and syncs, and writes that are whole or not at all.

Lustre without `-o flock`, NFS without lockd, FUSE, exFAT and SMB each lack some of these calls. Where one is missing, what it was
for is done another way, or its return value says that it was not done.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a file system answers to a call that it does not have.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Makes a file and holds its exclusive lock, which goes with the process, however that ends.

    Yields:
      whether it is held; False where the file system has no locks.

    Raises:
      BlockingIOError: another process holds it, and `wait` is False.
      OSError: the file can't be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        descriptor = os.open(path, os.O_RDONLY)  # of another user, who may have made it for himself
    try:
        yield lock(descriptor, wait=wait)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool) -> bool:
    """Takes the exclusive lock of an open file; see `locked`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno == errno.EACCES:  # some file systems say so what others call EWOULDBLOCK
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK)) from error
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def link(source: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where that can't be: without hard links, or on another disk."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EPERM, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(source, target)


def sync(path: Path) -> bool:
    """Has the disk hold what was written to a file, or which names a directory has; False where the file system can't say so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> bool:
    """`sync` of an open file or directory."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def has_record_locks(directory: Path) -> bool:
    """Whether files of a directory can be locked by `fcntl`, as tensorstore and sqlite do."""
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return False
    return True


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file: a reader sees the old content or the new one, never a part, also after a crash."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            sync_descriptor(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def create_whole(path: Path, content: bytes) -> bool:
    """Makes a file that is not there yet; False where it is. Of several processes that do so at once, one gets True.

    A reader sees all of it; on a file system without hard links, none or a part for a moment.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.write_bytes(content)
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EPERM, errno.EMLINK):
            raise
        return _create_in_place(path, content)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _create_in_place(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True
