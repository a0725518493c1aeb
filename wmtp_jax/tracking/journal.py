"""tracking.jsonl, what MLflow should know of a run besides its metrics: parameters, tags, artifacts, the end, a line each. The
training appends to it, and one process at a time feeds MLflow from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.storage import files

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
    with ExitStack() as held:
        try:
            # Where a file system has no locks, two senders repeat each other's points, which is harmless.
            held.enter_context(files.locked(run / JOURNAL_FILE, wait=wait))
        except BlockingIOError as error:
            raise UserError(f"{run}: its training is running and feeds MLflow itself; replay it afterwards") from error
        yield
