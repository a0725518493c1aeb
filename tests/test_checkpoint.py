"""Saving and restoring: what is kept, what counts as complete, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmtp_jax.checkpoint import Checkpoints, find_checkpoint, load_model
from wmtp_jax.errors import UserError
from wmtp_jax.train_step import TrainState


def make_state(step: int, width: int = 3) -> TrainState:
    parameters = {"embedding": jnp.full((4, width), float(step)), "final_norm": {"scale": jnp.ones(width)}}
    optimizer = ({"count": jnp.int32(step)}, jax.tree.map(jnp.zeros_like, parameters))
    return TrainState(jnp.int32(step), jnp.int32(1), parameters, optimizer)


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
    state = make_state(3)
    noise = jax.random.normal(jax.random.key(0), (4, 3))
    state = state._replace(parameters={**state.parameters, "embedding": noise})
    checkpoints.save(state, {"stage": "train"})
    checkpoints.wait()
    restored = checkpoints.restore(3, make_state(0))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for saved, loaded in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert saved.dtype == loaded.dtype
        np.testing.assert_array_equal(saved, loaded)
    assert checkpoints.metadata(3)["stage"] == "train"


def test_the_last_ones_and_the_best_are_kept(checkpoints):
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(checkpoints, step, metric)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2


def test_an_unfinished_checkpoint_does_not_count(checkpoints, tmp_path):
    save(checkpoints, 1)
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp-1").mkdir()
    assert find_checkpoint(tmp_path).name == "1"
    again = Checkpoints(tmp_path / "checkpoints", keep_last=2, best_metric="")
    assert again.steps() == [1]
    again.close()


def test_parameters_of_another_shape_are_refused_by_name(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(UserError, match=r"embedding is of shape \(4, 3\) there and of shape \(4, 5\) here"):
        checkpoints.restore(1, make_state(0, width=5))
    other = make_state(0)
    other = other._replace(parameters={**other.parameters, "unembedding": jnp.zeros((3, 4))})
    with pytest.raises(UserError, match="unembedding is absent there"):
        checkpoints.restore(1, other)


def test_places_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        load_model(tmp_path / "nowhere")
