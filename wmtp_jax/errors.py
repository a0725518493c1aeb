"""The errors that end a run on purpose; `main.py` turns each into one line on stderr and an exit code."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OVERHEAD = 1 << 20  # bytes of indices and markers that come with what is written
_CLOSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class UserError(Exception):
    """What the user can put right: names the key, file or line, and what to do. Exit code 2, without a traceback."""


class NonFiniteLoss(Exception):
    """The loss or a gradient became NaN or infinite; what explains it was saved. Exit code 3."""


@contextmanager
def disk_errors(directory: Path, *, setting: str) -> Iterator[None]:
    """Turns a full or closed disk under `directory` into a UserError that names it and the setting to change.

    Args:
      directory: what is being written to.
      setting: the flag or key that names another directory.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # tensorstore reports the operating system's errors as a ValueError with the same words.
        known = {code: os.strerror(code) for code in (*_NO_ROOM, *_CLOSED)}
        number = getattr(error, "errno", None)
        elsewhere = getattr(error, "filename", None)
        if elsewhere is not None and not Path(elsewhere).absolute().is_relative_to(Path(directory).absolute()):
            raise
        if isinstance(error, ValueError):
            number = next((code for code, words in known.items() if words in str(error)), None)
        if number in _NO_ROOM:
            raise UserError(
                f"{directory}: no room left on its disk; make some, or name another directory in {setting}"
            ) from error
        if number in _CLOSED:
            raise UserError(
                f"{directory}: can't be written to ({known[number]}); name another directory in {setting}"
            ) from error
        raise


def check_room(directory: Path, size: int, *, setting: str) -> None:
    """Refuses to begin what the disk of `directory` can't hold.

    A library that meets a full disk halfway tells so from threads of its own, in tracebacks that hide the one line.

    Args:
      directory: what is to be written to; it exists.
      size: of what is to be written, bytes.
      setting: the flag or key that names another directory.

    Raises:
      UserError: there is less room than that.
    """
    free, needed = shutil.disk_usage(directory).free, size + _OVERHEAD
    if free < needed:
        # Rounded apart, so that what is free never looks like enough.
        needed_mib, free_mib = math.ceil(needed / 2**20 * 10) / 10, math.floor(free / 2**20 * 10) / 10
        raise UserError(
            f"{directory}: no room left on its disk: {needed_mib:,.1f} MiB are needed, {free_mib:,.1f} MiB are free; make some, "
            f"or name another directory in {setting}"
        )
