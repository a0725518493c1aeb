"""Schedules by hand, AdamW against literal NumPy, Muon by its defining property."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wmtp_jax.model import Model, ModelSettings, split
from wmtp_jax.optimizer import make_optimizer, make_schedule, parameter_kinds
from wmtp_jax.settings import Optimizer

SETTINGS = Optimizer(
    name="adamw", learning_rate=0.1, muon_learning_rate=0.5, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.0,
    clip_norm=0.0, schedule="constant", warmup_steps=0, decay_fraction=0.2, final_fraction=0.1,
)  # fmt: skip


def with_(**changes) -> Optimizer:
    return dataclasses.replace(SETTINGS, **changes)


def test_cosine_falls_from_one_to_the_final_fraction():
    schedule = make_schedule(with_(schedule="cosine", warmup_steps=4), 104)
    assert [float(schedule(step)) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert float(schedule(54)) == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine
    assert float(schedule(104)) == pytest.approx(0.1)


def test_wsd_is_stable_then_linear():
    schedule = make_schedule(with_(schedule="wsd", warmup_steps=10), 100)
    assert float(schedule(10)) == float(schedule(79)) == 1.0
    assert float(schedule(90)) == pytest.approx(0.55)
    assert float(schedule(100)) == pytest.approx(0.1)


def test_a_warm_up_is_at_most_half_of_a_short_run():
    schedule = make_schedule(with_(warmup_steps=1000), 8)
    assert float(schedule(4)) == 1.0 and float(schedule(3)) == pytest.approx(0.8)


def test_adamw_against_literal_numpy():
    """Five updates; weight decay on the matrix alone."""
    settings = with_(weight_decay=0.01)
    optimizer = make_optimizer(settings, 10)
    parameters = {"a": {"kernel": jnp.ones((3, 2))}, "norm": {"scale": jnp.ones((2,))}}
    state = optimizer.init(parameters)
    expected = {"kernel": np.ones((3, 2)), "scale": np.ones(2)}
    moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in expected.items()}
    random = np.random.default_rng(0)
    for step in range(1, 6):
        gradient = {name: random.normal(size=value.shape) for name, value in expected.items()}
        updates, state = optimizer.update(
            {"a": {"kernel": jnp.asarray(gradient["kernel"])}, "norm": {"scale": jnp.asarray(gradient["scale"])}},
            state, parameters,
        )  # fmt: skip
        parameters = jax.tree.map(jnp.add, parameters, updates)
        for name, value in expected.items():
            first, second = moments[name]
            first = 0.9 * first + 0.1 * gradient[name]
            second = 0.95 * second + 0.05 * gradient[name] ** 2
            moments[name] = first, second
            step_size = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
            expected[name] = value - 0.1 * (step_size + (0.01 * value if name == "kernel" else 0.0))
    np.testing.assert_allclose(parameters["a"]["kernel"], expected["kernel"], rtol=1e-5)
    np.testing.assert_allclose(parameters["norm"]["scale"], expected["scale"], rtol=1e-5)


def test_clipping_scales_the_global_norm():
    """AdamW's first step is the sign of the gradient either way; its second tells how large the two were beside each other."""
    clipped, plain = make_optimizer(with_(clip_norm=1.0), 10), make_optimizer(SETTINGS, 10)
    parameters = {"a": {"kernel": jnp.zeros((2, 2))}}
    small, large = ({"a": {"kernel": scale * jnp.asarray([[3.0, 0.0], [0.0, 4.0]])}} for scale in (0.2, 20.0))

    def second_update(optimizer):
        state = optimizer.init(parameters)
        _, state = optimizer.update(small, state, parameters)
        return optimizer.update(large, state, parameters)[0]["a"]["kernel"]

    # Clipped to norm 1, the large gradient is the small one again: two equal steps.
    np.testing.assert_allclose(second_update(clipped), -0.1 * np.eye(2), rtol=1e-4)
    # Unclipped, by hand: m = (0.09 * 0.6 + 0.1 * 60) / 0.19, v = (0.0475 * 0.36 + 0.05 * 3600) / 0.0975.
    assert float(second_update(plain)[0, 0]) == pytest.approx(-0.0742, abs=1e-4)


def test_muon_orthogonalises_every_matrix_of_a_stack_by_itself():
    optimizer = make_optimizer(with_(name="muon"), 10)
    random = np.random.default_rng(0)
    stack = random.normal(size=(3, 8, 8)) * np.array([1.0, 100.0, 0.01])[:, None, None]
    parameters = {"layers": {"up": {"kernel": jnp.zeros((3, 8, 8))}}, "embedding": jnp.zeros((5, 8))}
    gradients = {"layers": {"up": {"kernel": jnp.asarray(stack, jnp.float32)}}, "embedding": jnp.ones((5, 8))}
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    got = np.asarray(updates["layers"]["up"]["kernel"], np.float64)
    for matrix, gradient in zip(got, stack, strict=True):
        left, _, right = np.linalg.svd(gradient)
        rotated = left.T @ matrix @ right.T / -0.5
        # The gradient's singular vectors stay; its singular values, whatever their scale, all go towards one.
        np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=0.02)
        assert 0.6 < np.median(np.diag(rotated)) < 1.3
    # The rest by AdamW with Nesterov's momentum, as optax has it: a first step of 0.9 * 0.1 / (1 - 0.9^2) + 0.1 / (1 - 0.9).
    np.testing.assert_allclose(updates["embedding"], -0.1 * (0.09 / 0.19 + 1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "block", "sequential"])
def test_kinds_of_parameters(kind):
    settings = ModelSettings(
        vocabulary_size=20, width=8, layers=2, attention_heads=2, kv_heads=2, head_dim=4, mlp_width=16, max_positions=8,
        num_heads=3, head_kind=kind, positions="learned", qkv_bias=True,
    )  # fmt: skip
    _, parameters = split(nnx.eval_shape(lambda: Model(settings, rngs=nnx.Rngs(0), value_head=True)))
    kinds = parameter_kinds(parameters)
    assert kinds["embedding"] == kinds["unembedding"] == kinds["position_embedding"] == "table"
    assert kinds["layers"]["attention"]["query"] == {"kernel": "matrix", "bias": "vector"}
    assert kinds["final_norm"]["scale"] == "vector"
    if kind == "linear":
        assert kinds["heads"] == "table"
    else:
        flat = jax.tree_util.tree_leaves_with_path(kinds["heads"])
        assert {kind for path, kind in flat if path[-1].key == "kernel"} == {"matrix"}
