"""Who runs which part of a study, where several processes, perhaps on several machines, share its directory.

A claim is a file `runs/claims/PART.GENERATION.json` that only one process can make. Its owner writes it anew every
`BEAT_SECONDS`; one that stands still for `DEAD_SECONDS`, or whose process is gone from this machine, is dead, and whoever makes
the next generation's file has taken the part over. An owner that was only asleep sees that file and gives up. Nothing is
compared with another machine's clock.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from wmtp_jax.study.directory import Directory

FOLDER = "runs/claims"
BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
_CLOCK_MOVES = 5.0  # seconds


class Claims:
    """The claims of one process.

    Args:
      directory: of the study.
      beat_seconds, dead_seconds: see above.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        beat_seconds: float = BEAT_SECONDS,
        dead_seconds: float = DEAD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._directory, self._clock = directory, clock
        self._beat_seconds, self._dead_seconds = beat_seconds, dead_seconds
        self._owner = {
            "owner": uuid.uuid4().hex,
            "machine": _machine(),
            "process": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._held: dict[str, int] = {}
        self._beats = 0
        self._beaten_at = -float("inf")
        self._seen: dict[str, tuple[bytes, float]] = {}  # a claim's file -> its content and since when

    @property
    def held(self) -> list[str]:
        """The parts that this process runs."""
        return list(self._held)

    def take(self, part: str) -> bool:
        """Takes a part that nobody runs, or whose owner is dead; whether it was to be had."""
        generation, content = self._newest(part)
        if content is not None and not self._is_free(_name(part, generation), content):
            return False
        taken = self._directory.create(_name(part, generation + 1), self._content())
        if taken:
            self._held[part] = generation + 1
        return taken

    def beat(self) -> list[str]:
        """Says that this process lives, where it is time to; returns the parts that others have taken over."""
        now = self._clock()
        if now - self._beaten_at < self._beat_seconds:
            return []
        self._beaten_at, self._beats = now, self._beats + 1
        lost = [part for part, generation in self._held.items() if self._newest(part)[0] > generation]
        for part in lost:
            del self._held[part]
        for part, generation in self._held.items():
            self._directory.write(_name(part, generation), self._content())
        return lost

    def release(self, part: str) -> None:
        """Leaves a part to whoever wants it."""
        generation = self._held.pop(part)
        self._directory.write(_name(part, generation), self._content(released=True))

    def _newest(self, part: str) -> tuple[int, bytes | None]:
        names = [name for name in self._directory.names(FOLDER) if name.startswith(f"{FOLDER}/{part}.")]
        generation = max((int(name.split(".")[-2]) for name in names), default=0)
        return generation, self._directory.read(_name(part, generation)) if generation else None

    def _is_free(self, name: str, content: bytes) -> bool:
        try:
            claim = json.loads(content)
            if claim["released"] or _is_gone(claim):
                return True
        except ValueError:
            pass  # it is being written, or its owner died over it
        before, since = self._seen.get(name, (b"", 0.0))
        if before != content:
            self._seen[name] = (content, self._clock())
            return False
        return self._clock() - since > self._dead_seconds

    def _content(self, *, released: bool = False) -> bytes:
        return json.dumps({**self._owner, "beat": self._beats, "released": released}).encode()


def _name(part: str, generation: int) -> str:
    return f"{FOLDER}/{part}.{generation}.json"


def _is_gone(claim: dict[str, Any]) -> bool:
    """Whether a claim is of a process of this machine that has ended."""
    started = _started(claim["process"])
    # A clock that is set moves the time that a process is said to have started at by as much.
    is_another = started is None or abs(started - claim["started"]) > _CLOCK_MOVES
    return claim["machine"] == _machine() and is_another


def _started(process: int) -> float | None:
    """When a process started; numbers of processes are given again. None: there is none, or a dead one that nobody has reaped."""
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    except psutil.NoSuchProcess:
        return None


def _machine() -> str:
    """What is the same for all processes that see one another's numbers: a host since it started, or a container on it."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    started = boot.read_text().strip() if boot.exists() else ""
    return " ".join([platform.node(), started, os.readlink(namespace) if namespace.exists() else ""])
