"""The torch backend's checkpoints: what is kept, what counts as complete, what is refused; crossing over is in tests/parity."""

from __future__ import annotations

import errno
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import wmtp_jax.checkpoint.orbax
import wmtp_jax.train_step
from wmtp_jax.checkpoint.parameters import read_parameters
from wmtp_jax.checkpoint.run_directory import adopt, find_checkpoint
from wmtp_jax.errors import UserError
from wmtp_torch import step_directories
from wmtp_torch.checkpoint import Checkpoints, load_model
from wmtp_torch.optimizer import OptimizerState
from wmtp_torch.train_step import TrainState


def make_state(step: int, width: int = 3) -> TrainState:
    generator = torch.Generator().manual_seed(step)
    shapes = {"embedding": (4, width), "layers.mlp.up.kernel": (2, width, 5), "final_norm.scale": (width,)}
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    first, second = ({name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()} for _ in range(2))
    second.pop("layers.mlp.up.kernel")  # as Muon has it
    count = torch.tensor(max(step - 1, 0), dtype=torch.int32)
    return TrainState(step, torch.tensor(1, dtype=torch.int32), parameters, OptimizerState(count, first, second))


def tensors_of(state: TrainState) -> list[torch.Tensor]:
    optimizer = state.optimizer_state
    groups = (state.parameters, optimizer.first, optimizer.second)
    return [state.skipped, optimizer.count, *(group[name] for group in groups for name in sorted(group))]


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", keep_last=2, best_metric="eval/bits_per_byte")
    yield opened
    opened.close()


def save(checkpoints: Checkpoints, step: int, metric: float | None = None) -> None:
    metrics = None if metric is None else {"eval/bits_per_byte": metric}
    checkpoints.save(make_state(step), {"stage": "train", "note": step}, metrics)
    checkpoints.wait()


def test_round_trip_to_the_bit(checkpoints):
    save(checkpoints, 3)
    assert checkpoints.metadata(3)["stage"] == "train" and checkpoints.metadata(3)["note"] == 3
    like, wanted = make_state(9), make_state(3)
    restored = checkpoints.restore(3, like)
    assert restored.step == 3
    for saved, loaded in zip(tensors_of(wanted), tensors_of(restored), strict=True):
        assert saved.dtype == loaded.dtype and torch.equal(saved, loaded)
    # In place: an optimizer or model that holds the tensors sees what was restored.
    assert restored.parameters["embedding"] is like.parameters["embedding"]
    assert restored.parameters["embedding"].requires_grad


def test_updates_go_on_while_a_save_is_written(checkpoints, monkeypatch):
    """What is written is what was there when `save` was called."""
    state, written = make_state(1), step_directories.write_arrays

    def write_late(path, named, metadata):
        assert changed.wait(60)
        written(path, named, metadata)

    changed = threading.Event()
    monkeypatch.setattr(step_directories, "write_arrays", write_late)
    checkpoints.save(state, {})
    checkpoints.wait(0.01)
    assert checkpoints.steps() == []
    with torch.no_grad():
        for tensor in tensors_of(state):
            tensor.zero_()
    changed.set()
    checkpoints.wait()
    restored = checkpoints.restore(1, make_state(5))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(restored), tensors_of(make_state(1)), strict=True))


def test_the_last_ones_and_the_best_are_kept(checkpoints):
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(checkpoints, step, metric)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    again = Checkpoints(checkpoints.directory, keep_last=2, best_metric="eval/bits_per_byte")
    assert again.best_step() == 2
    again.close()


def test_a_step_is_saved_once(checkpoints):
    save(checkpoints, 4, 1.0)
    checkpoints.save(make_state(4), {"stage": "other"})
    checkpoints.wait()
    assert checkpoints.metadata(4)["stage"] == "train"


def test_an_unfinished_checkpoint_does_not_count(checkpoints, tmp_path):
    save(checkpoints, 1)
    (tmp_path / "checkpoints" / "7.partial" / "parameters").mkdir(parents=True)
    assert checkpoints.steps() == [1] and find_checkpoint(tmp_path).name == "1"
    Checkpoints(tmp_path / "checkpoints", keep_last=2, best_metric="").close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_full_disk_ends_in_one_line_and_leaves_no_checkpoint(checkpoints, monkeypatch):
    save(checkpoints, 1)

    def fill_the_disk(path, named, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(step_directories, "write_arrays", fill_the_disk)
    checkpoints.save(make_state(2), {})
    with pytest.raises(UserError, match="no room left on its disk"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_parameters_of_another_shape_are_refused_by_name(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(UserError, match=r"embedding is of shape \(4, 3\) there and of shape \(4, 5\) here"):
        checkpoints.restore(1, make_state(0, width=5))
    other = make_state(0)
    other.optimizer_state.second["layers.mlp.up.kernel"] = torch.zeros(2, 3, 5)
    with pytest.raises(UserError, match=r"second\.layers\.mlp\.up\.kernel is absent there"):
        checkpoints.restore(1, other)


def test_another_run_goes_on_from_a_copy(checkpoints, tmp_path):
    save(checkpoints, 4)
    (tmp_path / "copy").mkdir()
    adopt(find_checkpoint(tmp_path), tmp_path / "copy")
    again = Checkpoints(tmp_path / "copy" / "checkpoints", keep_last=1, best_metric="")
    assert torch.equal(again.restore(4, make_state(0)).parameters["embedding"], make_state(4).parameters["embedding"])
    again.close()


def test_an_optimizer_state_of_the_other_backend_is_refused(checkpoints, tmp_path):
    save(checkpoints, 2)
    with pytest.raises(UserError, match="wmtp_torch, which wmtp_jax can't go on with"):
        wmtp_jax.checkpoint.orbax.Checkpoints(checkpoints.directory, keep_last=2, best_metric="")
    own = wmtp_jax.checkpoint.orbax.Checkpoints(tmp_path / "jax", keep_last=2, best_metric="")
    own.save(wmtp_jax.train_step.TrainState(jnp.int32(1), jnp.int32(0), {"embedding": jnp.ones(2)}, ()), {})
    own.close()
    with pytest.raises(UserError, match="wmtp_jax, which wmtp_torch can't go on with"):
        Checkpoints(tmp_path / "jax", keep_last=2, best_metric="")
    np.testing.assert_array_equal(read_parameters(tmp_path / "jax")[0]["embedding"], np.ones(2))


def test_places_without_a_model_are_refused(checkpoints, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_model(tmp_path / "nowhere")
