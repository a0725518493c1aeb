"""tracking.jsonl, what MLflow should know of a run besides its metrics: parameters, tags, artifacts, the end, a line each. The
training appends to it, and one process at a time feeds MLflow from it.
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError

JOURNAL_FILE = "tracking.jsonl"


def read_journal(path: Path, begin: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal from byte `begin`, and where they end."""
    if not path.exists():
        return [], begin
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    return [json.loads(raw) for raw in data.splitlines()], begin + len(data)


@contextmanager
def only_one(run: Path, *, wait: bool) -> Iterator[None]:
    """Holds a run's journal, so that one process at a time feeds MLflow from it."""
    with (run / JOURNAL_FILE).open("a") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{run}: its training is running and feeds MLflow itself; replay it afterwards") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            # Some network file systems have no locks; two senders would repeat each other's points, which is harmless.
        yield
