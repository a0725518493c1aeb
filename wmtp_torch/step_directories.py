"""Directories named by a step, each there as a whole or not at all: array files of checkpoints, for a backend without Orbax.

One is written beside its place, by a thread, since a model's 12 bytes a parameter take a disk longer than many updates take,
and renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.checkpoint.manifest import seal, settle
from wmtp_jax.checkpoint.mirror import Mirror
from wmtp_jax.checkpoint.parameters import write_arrays
from wmtp_jax.checkpoint.run_directory import write_json
from wmtp_jax.errors import check_room, disk_errors
from wmtp_jax.storage.files import sync

_PARTIAL = ".partial"
_METRICS = "metrics.json"
# Path in the directory -> arrays and metadata; see `write_arrays`.
Files = Mapping[Path, tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]


class StepDirectories:
    """The last few directories, and the best by a metric.

    Args:
      directory: that they are in; made if it is not there.
      keep_last: how many of the newest to keep.
      best_metric: name of the evaluation metric whose lowest value is kept as well; "" for none. Only steps that were
        evaluated take part.
      mirror: what brings complete ones to object storage; None: they stay here.

    Raises:
      UserError: the directory can't be made, or all that is in it is damaged.
    """

    def __init__(self, directory: Path, *, keep_last: int, best_metric: str, mirror: Mirror | None = None):
        self._mirror = mirror
        self.directory, self.keep_last, self.best_metric = directory, keep_last, best_metric
        self._pending: Future | None = None
        self._writer = ThreadPoolExecutor(1)
        with disk_errors(directory, setting="--workdir"):
            directory.mkdir(parents=True, exist_ok=True)
            for partial in directory.glob(f"*{_PARTIAL}"):
                shutil.rmtree(partial)
            settle(directory)

    def path(self, step: int) -> Path:
        """Where a step lies."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Steps that are there as a whole, ascending."""
        return sorted(int(path.name) for path in self.directory.glob("*") if path.name.isdigit())

    def best_step(self) -> int | None:
        """The step with the lowest value of the best metric; None where none was evaluated."""
        evaluated = {step: json.loads((self.path(step) / _METRICS).read_bytes()) for step in self.steps()}
        scores = [(metrics[self.best_metric], step) for step, metrics in evaluated.items() if self.best_metric in metrics]
        return min(scores)[1] if scores else None

    def write(self, step: int, files: Files, metrics: Mapping[str, float] | None) -> None:
        """Begins to write a step and returns; a step that is there already is left as it is. Waits first for what was begun
        before, and for an upload where two are outstanding.

        Args:
          step: not one that is being written.
          files: what nobody changes until `wait` returns.
          metrics: of an evaluation, if there was one.

        Raises:
          UserError: the disk has no room for it, or what was begun before failed.
        """
        self.wait()
        if step not in self.steps():
            size = sum(array.nbytes for named, _ in files.values() for array in named.values())
            check_room(self.directory, size, setting="--workdir")
            if self._mirror is not None:
                self._mirror.wait_for_room()
            self._pending = self._writer.submit(self._write, step, files, metrics or {})

    def wait(self, timeout: float | None = None) -> None:
        """Until what was begun is complete, or for as many seconds.

        Raises:
          UserError: the disk is full or closed.
        """
        if self._pending is not None and self._pending in wait([self._pending], timeout).done:
            pending, self._pending = self._pending, None
            with disk_errors(self.directory, setting="--workdir"):
                pending.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        self._writer.shutdown()
        self.wait()

    def _write(self, step: int, files: Files, metrics: Mapping[str, float]) -> None:
        partial = self.directory / f"{step}{_PARTIAL}"
        for file, (named, metadata) in files.items():
            (partial / file).parent.mkdir(parents=True)
            write_arrays(partial / file, named, metadata)
        write_json(partial / _METRICS, dict(metrics))
        seal(partial, step, metrics=metrics, keep_last=self.keep_last, best_metric=self.best_metric)
        partial.rename(self.path(step))
        sync(self.directory)
        if self._mirror is not None:
            self._mirror.hand_over(self.path(step))
        for old in set(self.steps()) - {*self.steps()[-self.keep_last :], self.best_step()}:
            # First under a name that does not count: half removed, it must not count either.
            shutil.rmtree(self.path(old).rename(self.directory / f"{old}{_PARTIAL}"))
