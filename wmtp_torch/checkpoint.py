"""Checkpoints: parameters, optimizer state, counters and what made them, one directory a step, as `wmtp_jax.checkpoint` has
them. The parameters are in the file that both backends read; the optimizer's moments are in another of the same format.

A checkpoint counts only under its number: it is written beside it, by a thread, since a model's 12 bytes a parameter take a
disk longer than many updates take, and renamed when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmtp_jax.errors import disk_errors
from wmtp_jax.parameters_file import (
    FILE,
    check_backend,
    check_shapes,
    read_arrays,
    read_metadata,
    read_parameters,
    write_arrays,
)
from wmtp_jax.run_directory import find_checkpoint
from wmtp_jax.settings import ModelSettings
from wmtp_torch.model import Model, Parameters, merge
from wmtp_torch.train_step import TrainState

BACKEND = "torch"
_TRAINING = Path("training", "training.safetensors")
_PARTIAL = ".partial"


class Checkpoints:
    """The checkpoints of one run: the last few, and the best by a metric.

    Args:
      directory: made if it is not there.
      keep_last: how many of the newest to keep.
      best_metric: name of the evaluation metric whose lowest value is kept as well; "" for none. Only saves whose step
        was evaluated take part.

    Raises:
      UserError: the directory can't be made, or its newest checkpoint is of the other backend.
    """

    def __init__(self, directory: Path, *, keep_last: int, best_metric: str):
        self.directory, self.keep_last, self.best_metric = directory, keep_last, best_metric
        self._pending: Future | None = None
        self._writer = ThreadPoolExecutor(1)
        with disk_errors(directory, setting="--workdir"):
            directory.mkdir(parents=True, exist_ok=True)
            for partial in directory.glob(f"*{_PARTIAL}"):
                shutil.rmtree(partial)
        if self.steps():
            check_backend(find_checkpoint(directory), BACKEND)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(path.name) for path in self.directory.glob("*") if path.name.isdigit())

    def best_step(self) -> int | None:
        """The step with the lowest value of the best metric; None where no save was evaluated."""
        evaluated = {step: read_metadata(self._path(step) / _TRAINING)["metrics"] or {} for step in self.steps()}
        scores = {step: metrics[self.best_metric] for step, metrics in evaluated.items() if self.best_metric in metrics}
        return min(scores, key=scores.get) if scores else None

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Copies the state and writes it in the background; waits for the save before this one first.

        Args:
          state: the whole training state.
          metadata: JSON values that describe it.
          metrics: of an evaluation of this very state, if there was one.
        """
        self.wait()
        if state.step in self.steps():
            return
        optimizer = state.optimizer_state
        counts = {"step": state.step, "skipped": int(state.skipped), "count": int(optimizer.count), "metrics": metrics}
        files = {
            FILE: (_to_host(state.parameters), {"backend": BACKEND, **metadata}),
            _TRAINING: (_to_host(_moments(optimizer.first, optimizer.second)), counts),
        }
        self._pending = self._writer.submit(self._write, state.step, files)

    def wait(self) -> None:
        """Until the last save is complete."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with disk_errors(self.directory, setting="--workdir"):
                pending.result()

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given to describe the state of this step."""
        return read_metadata(self._path(step) / FILE)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, in the tensors of `like`.

        Raises:
          UserError: the checkpoint is damaged, or holds other parameters, named with both shapes.
        """
        where, optimizer = self._path(step), like.optimizer_state
        into = {FILE: like.parameters, _TRAINING: _moments(optimizer.first, optimizer.second)}
        stored = {file: read_arrays(where / file) for file in into}
        for file, tensors in into.items():
            check_shapes(stored[file][0], tensors, where)
        with torch.no_grad():
            for file, tensors in into.items():
                for name, tensor in tensors.items():
                    tensor.copy_(_tensor(stored[file][0][name]))
            counts = stored[_TRAINING][1]
            like.skipped.fill_(counts["skipped"])
            optimizer.count.fill_(counts["count"])
        return like._replace(step=counts["step"])

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        self._writer.shutdown()
        self.wait()

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _write(self, step: int, files: Mapping[Path, tuple[dict[str, np.ndarray], dict[str, Any]]]) -> None:
        partial = self.directory / f"{step}{_PARTIAL}"
        for file, (named, metadata) in files.items():
            (partial / file).parent.mkdir(parents=True)
            write_arrays(partial / file, named, metadata)
        partial.rename(self._path(step))
        descriptor = os.open(self.directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        keep = {*self.steps()[-self.keep_last :], self.best_step()}
        for old in set(self.steps()) - keep:
            # Under its number it would count, half of it removed or not.
            removed = self._path(old).rename(self.directory / f"{old}{_PARTIAL}")
            shutil.rmtree(removed)


def load_model(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Model, dict[str, Any]]:
    """The model of a run directory or a checkpoint of either backend, for evaluation or as a reference.

    Returns:
      it, and the metadata that it was saved with.

    Raises:
      UserError: no checkpoint there, one that is damaged or not of this program, or one without a whole model.
    """
    where = find_checkpoint(path)
    named, metadata = read_parameters(where)
    settings = ModelSettings(**metadata["model"])
    value_head = any(name.startswith("value_head.") for name in named)
    check_shapes(named, dict(Model(settings, value_head=value_head).named_parameters()), where)
    return merge(settings, {name: _tensor(array).to(device) for name, array in named.items()}), metadata


def _moments(first: Parameters, second: Parameters) -> Parameters:
    return {f"{kind}.{name}": x for kind, group in (("first", first), ("second", second)) for name, x in group.items()}


def _to_host(tensors: Parameters) -> dict[str, np.ndarray]:
    # A copy also where the host is the device: the next update changes the tensors in place.
    return {name: tensor.detach().to("cpu", copy=True).numpy() for name, tensor in tensors.items()}


def _tensor(array: np.ndarray) -> torch.Tensor:
    # A copy: the file's map is read-only, which torch can't express.
    return torch.from_numpy(array.copy())
