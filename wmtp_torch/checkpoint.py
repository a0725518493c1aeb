"""Checkpoints: parameters, optimizer state, counters and what made them, one directory a step, as `wmtp_jax.checkpoint.orbax` has
them. The parameters are in the file that both backends read; the optimizer's moments are in another of the same format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmtp_jax.checkpoint.mirror import Mirror
from wmtp_jax.checkpoint.parameters import (
    FILE,
    check_backend,
    check_shapes,
    read_arrays,
    read_metadata,
    read_parameters,
)
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.settings import ModelSettings
from wmtp_torch.model import Model, Parameters, merge
from wmtp_torch.step_directories import StepDirectories
from wmtp_torch.train_step import TrainState

BACKEND = "torch"
_TRAINING = Path("training", "training.safetensors")


class Checkpoints(StepDirectories):
    """The checkpoints of one run: the last few, and the best by a metric.

    Raises:
      UserError: the directory can't be made, or its newest checkpoint is of the other backend.
    """

    def __init__(self, directory: Path, *, keep_last: int, best_metric: str, mirror: Mirror | None = None):
        super().__init__(directory, keep_last=keep_last, best_metric=best_metric, mirror=mirror)
        if self.steps():
            check_backend(find_checkpoint(directory), BACKEND)

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Copies the state and writes it in the background; waits for the save before this one first.

        Args:
          state: the whole training state.
          metadata: JSON values that describe it.
          metrics: of an evaluation of this very state, if there was one.
        """
        self.wait()  # before there is another copy
        counts = {"step": state.step, "skipped": int(state.skipped), "count": int(state.optimizer_state.count)}
        described = {"backend": BACKEND, **metadata}
        files = {FILE: (_to_host(state.parameters), described), _TRAINING: (_to_host(_moments(state)), counts)}
        self.write(state.step, files, metrics)

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given to describe the state of this step."""
        return read_metadata(self.path(step) / FILE)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, in the tensors of `like`.

        Raises:
          UserError: the checkpoint is damaged, or holds other parameters, named with both shapes.
        """
        where, wanted = self.path(step), {**like.parameters, **_moments(like)}
        (parameters, _), (moments, counts) = read_arrays(where / FILE), read_arrays(where / _TRAINING)
        stored = {**parameters, **moments}
        check_shapes(stored, wanted, where)
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(as_tensor(stored[name]))
            like.skipped.fill_(counts["skipped"])
            like.optimizer_state.count.fill_(counts["count"])
        return like._replace(step=counts["step"])


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
    return merge(settings, {name: as_tensor(array).to(device) for name, array in named.items()}), metadata


def _moments(state: TrainState) -> Parameters:
    groups = {"first": state.optimizer_state.first, "second": state.optimizer_state.second}
    return {f"{kind}.{name}": tensor for kind, group in groups.items() for name, tensor in group.items()}


def _to_host(tensors: Parameters) -> dict[str, np.ndarray]:
    # A copy also where the host is the device: the next update changes the tensors in place.
    return {name: tensor.detach().to("cpu", copy=True).numpy() for name, tensor in tensors.items()}


def as_tensor(x: Any) -> torch.Tensor:
    """An array as a tensor; memory that may be written is taken over, what belongs to a file's read-only map is copied."""
    if torch.is_tensor(x):
        return x
    return torch.from_numpy(x if x.flags.writeable and x.flags.c_contiguous else np.array(x))
