"""The torch backend's schedules and updates against optax's, update by update; what is left out where not finite."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import traverse_util

from wmtp_jax import optimizer as jax_optimizer
from wmtp_jax.settings import Optimizer
from wmtp_torch import optimizer as torch_optimizer

SETTINGS = Optimizer(
    name="adamw", learning_rate=3e-3, muon_learning_rate=0.02, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1,
    clip_norm=1.0, schedule="cosine", warmup_steps=5, decay_fraction=0.3, final_fraction=0.1,
)  # fmt: skip
# One of every kind that a model has: stacks of wide, tall and square matrices, tables, vectors, the value head's.
SHAPES = {
    "embedding": (11, 8), "unembedding": (8, 11), "heads": (2, 8, 11), "final_norm.scale": (8,), "layers.up.kernel": (3, 8, 12),
    "layers.up.bias": (3, 12), "layers.down.kernel": (3, 12, 8), "layers.output.kernel": (3, 8, 8), "project.kernel": (16, 8),
    "value_head.inner.kernel": (8, 4), "value_head.inner.bias": (4,),
}  # fmt: skip
STEPS = 20


def arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: (scale * generator.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def tensors(named: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in named.items()}


def nested(named: dict[str, np.ndarray]):
    return traverse_util.unflatten_dict({name: jnp.asarray(array) for name, array in named.items()}, sep=".")


def gradients_of(step: int) -> dict[str, np.ndarray]:
    # Norms around the limit of clipping, so that some updates are clipped and some are not.
    return arrays(100 + step, scale=0.02 if step % 3 else 0.5)


def optax_parameters(settings: Optimizer) -> list[dict[str, np.ndarray]]:
    """The parameters after each update."""
    optimizer, parameters = jax_optimizer.make_optimizer(settings, STEPS, value_learning_rate=1e-3), nested(arrays(0))
    state, seen = optimizer.init(parameters), []

    @jax.jit
    def update(parameters, state, gradients):
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    for step in range(STEPS):
        parameters, state = update(parameters, state, nested(gradients_of(step)))
        seen.append({k: np.asarray(v) for k, v in traverse_util.flatten_dict(parameters, sep=".").items()})
    return seen


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_twenty_updates_are_those_of_optax(name):
    """Largest difference relative to the largest entry of the parameter: float32 rounding, seen up to 1e-7."""
    settings = dataclasses.replace(SETTINGS, name=name)
    optimizer, parameters = torch_optimizer.Optimizer(settings, STEPS, value_learning_rate=1e-3), tensors(arrays(0))
    state, finite = optimizer.init(parameters), torch.tensor(True)
    assert ("layers.up.kernel" in state.second) == (name == "adamw")
    for step, wanted in enumerate(optax_parameters(settings)):
        optimizer.update(parameters, tensors(gradients_of(step)), state, finite=finite)
        for key, value in wanted.items():
            distance = np.abs(parameters[key].numpy() - value).max() / np.abs(value).max()
            assert distance <= 1e-6, (step, key, distance)
    assert int(state.count) == STEPS
    moved = {key: np.abs(value - arrays(0)[key]).max() for key, value in wanted.items()}
    assert min(moved.values()) > 1e-3, moved


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_that_is_not_finite_changes_nothing(name):
    settings = dataclasses.replace(SETTINGS, name=name)
    optimizer, parameters = torch_optimizer.Optimizer(settings, STEPS, value_learning_rate=1e-3), tensors(arrays(0))
    state = optimizer.init(parameters)
    # Before the first update, and between others.
    for step in range(3):
        before = [x.clone() for x in (*parameters.values(), state.count, *state.first.values(), *state.second.values())]
        broken = tensors(gradients_of(step))
        broken["layers.up.kernel"][0, 0, 0], broken["embedding"][0] = torch.nan, torch.inf
        optimizer.update(parameters, broken, state, finite=torch.tensor(False))
        after = (*parameters.values(), state.count, *state.first.values(), *state.second.values())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        optimizer.update(parameters, tensors(gradients_of(step)), state, finite=torch.tensor(True))
        assert not torch.equal(before[0], parameters["embedding"])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps,warmup", [(100, 10), (8, 1000), (1, 0), (7, 3)])
def test_schedules_are_those_of_optax(schedule, steps, warmup):
    settings = dataclasses.replace(SETTINGS, schedule=schedule, warmup_steps=warmup)
    ours, theirs = torch_optimizer.make_schedule(settings, steps), jax_optimizer.make_schedule(settings, steps)
    for step in range(steps + 3):
        assert ours(step) == pytest.approx(float(theirs(step)), rel=1e-5, abs=1e-6), step


def test_updates_past_the_schedule_keep_its_last_factor():
    optimizer, parameters = torch_optimizer.Optimizer(SETTINGS, 2, value_learning_rate=1e-3), tensors(arrays(0))
    state = optimizer.init(parameters)
    for step in range(5):
        before = parameters["embedding"].clone()
        optimizer.update(parameters, tensors(gradients_of(1)), state, finite=torch.tensor(True))
        if step > 2:  # Equal gradients: Adam's update is its rate in every entry.
            torch.testing.assert_close((before - parameters["embedding"]).abs().mean().item(), 3e-4, rtol=2e-3, atol=0)
