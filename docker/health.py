"""Whether a container's training is alive: the health check of docker/Dockerfile.

A run that goes on writes: a metric line every `train.log_every` steps, a checkpoint, a journal. Unhealthy is a container that has
written nothing into any run for WMTP_HEALTH_SECONDS (default 3600, above the time of the slowest compilation, evaluation or save)
since it started. A container that runs something else than `train` is healthy while it runs. Exit code 0 or 1.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

FILES = ("metrics.jsonl", "tracking.jsonl", "summary.json", "checkpoints", "mirror.json")


def silent_seconds(runs: Path, started: float, now: float) -> float:
    """Seconds since anything was written into a run directory below `runs` (its stages' included), or since the start."""
    newest = started
    for name in FILES:
        for path in (*runs.glob(f"*/{name}"), *runs.glob(f"*/*/{name}")):
            newest = max(newest, path.stat().st_mtime)
    return now - newest


def trains(process: Path) -> bool:
    """Whether a process, by its directory in /proc, is the trainer."""
    return b"wmtp_jax.main" in (process / "cmdline").read_bytes().split(b"\0")


def main(process: Path = Path("/proc/1")) -> int:
    if not trains(process):
        return 0
    limit = float(os.environ.get("WMTP_HEALTH_SECONDS", "3600"))
    silent = silent_seconds(Path(os.environ.get("WMTP_RUNS", "runs")), process.stat().st_mtime, time.time())
    if silent > limit:
        print(f"no run has written anything for {silent:.0f} s; the limit is WMTP_HEALTH_SECONDS={limit:g}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
