"""The critic: returns and scores by literal loops, the value loss beside the model's, and the value head's own update."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.test_train_step import SETTINGS, B, S, make_batch
from wmtp_jax import critic as critics
from wmtp_jax.critic import value_sums
from wmtp_jax.errors import UserError
from wmtp_jax.evaluation.metrics import value_metrics
from wmtp_jax.model import initial_parameters, merge
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.settings import Critic, Optimizer, Weighting
from wmtp_jax.train_step import (
    initial_state,
    inspect_tokens,
    loss_and_gradients,
    shared_states,
    token_score,
    token_values,
    train_step,
    value_loss,
    value_step,
)
from wmtp_jax.update import Objective

OPTIMIZER = Optimizer(
    name="adamw", learning_rate=1e-2, muon_learning_rate=0.02, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.0,
    clip_norm=1.0, schedule="constant", warmup_steps=0, decay_fraction=0.2, final_fraction=0.1,
)  # fmt: skip
CRITIC = Weighting(algorithm="critic-wmtp")


def critic_batch(seed: int = 0) -> dict[str, jax.Array]:
    """As `make_batch`, with a reward for every segment but one."""
    batch = make_batch(seed)
    random = np.random.default_rng(seed + 100)
    ids = np.asarray(batch["segment_ids"])
    rewards, rewarded = np.zeros((B, S), np.float32), np.zeros((B, S), bool)
    for b in range(B):
        for segment in sorted(set(ids[b]) - {0}):
            if (b, segment) == (2, 3):
                continue
            here = np.flatnonzero(ids[b] == segment)
            rewards[b, here[-1]] = random.normal()
            rewarded[b, here] = True
    return {**batch, "rewards": jnp.asarray(rewards), "rewarded": jnp.asarray(rewarded)}


@functools.cache
def critic_model():
    definition, parameters = initial_parameters(SETTINGS, 0, value_head=True)
    # The head's last layer starts at zero; values that differ are what these tests are about.
    outer = parameters["value_head"]["outer"]
    outer["kernel"] = outer["kernel"] + 0.3 * jax.random.normal(jax.random.key(5), outer["kernel"].shape)
    return definition, parameters


def values_of(parameters, batch) -> np.ndarray:
    model = merge(critic_model()[0], parameters)
    return np.asarray(token_values(model, shared_states(model, batch)), np.float64)


def loop_returns(values, rewards, ids, discount, decay) -> np.ndarray:
    """G[t] = r[t] + discount ((1 - decay) V[t+1] + decay G[t+1]), both 0 beyond the segment."""
    out = np.zeros_like(values)
    for b in range(values.shape[0]):
        for t in reversed(range(values.shape[1])):
            if ids[b, t] == 0:
                continue
            inside = t + 1 < values.shape[1] and ids[b, t + 1] == ids[b, t]
            ahead = (1 - decay) * values[b, t + 1] + decay * out[b, t + 1] if inside else 0.0
            out[b, t] = rewards[b, t] + discount * ahead
    return out


@pytest.mark.parametrize("discount, decay", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_returns_and_loss_by_literal_loops(discount, decay):
    batch, critic = critic_batch(), Critic(discount=discount, decay=decay)
    values = np.random.default_rng(1).normal(size=(B, S)).astype(np.float32)
    ids, rewards, rewarded = (np.asarray(batch[name]) for name in ("segment_ids", "rewards", "rewarded"))
    expected = loop_returns(values.astype(np.float64), rewards, ids, discount, decay)
    got = critics.lambda_returns(jnp.asarray(values), rewards, ids, discount=discount, decay=decay)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    loss = value_loss(jnp.asarray(values), rewards, rewarded, ids, critic=critic, denominator=jnp.float32(rewarded.sum()))
    assert float(loss) == pytest.approx(((values - expected) ** 2)[rewarded].mean(), rel=1e-5)
    # The targets are constants: the gradient is that of a plain squared error.
    gradient = jax.grad(
        lambda v: value_loss(v, rewards, rewarded, ids, critic=critic, denominator=jnp.float32(rewarded.sum()))
    )(jnp.asarray(values))
    np.testing.assert_allclose(gradient, np.where(rewarded, 2 * (values - expected) / rewarded.sum(), 0), atol=1e-6)


def test_scores_are_about_the_token_that_changed_the_value():
    """One row by hand: V jumps at token 2, so the value change of token 2 is that jump, and so is its advantage."""
    values = jnp.asarray([[0.0, 0.0, 1.0, 1.0, 5.0]])
    ids = jnp.asarray([[1, 1, 1, 1, 0]])
    rewards = jnp.asarray([[0.0, 0.0, 0.0, 1.0, 0.0]])
    np.testing.assert_allclose(token_score(values, rewards, ids, critic=Critic()), [[0, 0, 1, 0, 0]], atol=1e-6)
    advantage = token_score(values, rewards, ids, critic=Critic(score="advantage", decay=0.0))
    np.testing.assert_allclose(advantage, [[0, 0, 1, 0, 0]], atol=1e-6)
    # With λ = 1 the state before token 1 also gets the credit of what came later: A[0] = r - V[0].
    advantage = token_score(values, rewards, ids, critic=Critic(score="advantage", decay=1.0))
    np.testing.assert_allclose(advantage, [[0, 1, 1, 0, 0]], atol=1e-6)


def test_value_metrics_by_numpy():
    batches = [critic_batch(seed) for seed in range(3)]
    random = np.random.default_rng(4)
    values = [random.normal(size=(B, S)).astype(np.float32) for _ in batches]
    numbered = iter(values)

    def sums(batch):
        return value_sums(
            jnp.asarray(next(numbered)), batch["rewards"], batch["rewarded"], batch["segment_ids"], discount=0.9
        )

    got = value_metrics(sums, batches)
    targets, kept = [], []
    for batch, value in zip(batches, values, strict=True):
        ids, rewards, rewarded = (np.asarray(batch[name]) for name in ("segment_ids", "rewards", "rewarded"))
        targets.append(loop_returns(np.zeros((B, S)), rewards, ids, 0.9, 1.0)[rewarded])
        kept.append(value[rewarded])
    target, value = np.concatenate(targets), np.concatenate(kept)
    assert got["eval/explained_variance"] == pytest.approx(1 - np.var(target - value) / np.var(target), rel=1e-4)
    assert got["eval/value_loss"] == pytest.approx(((target - value) ** 2).mean(), rel=1e-5)


def test_equal_held_out_rewards_are_refused():
    batch = critic_batch()
    batch["rewards"] = jnp.where(batch["rewards"] != 0, 1.0, 0.0)
    zeros = jnp.zeros((B, S))
    with pytest.raises(UserError, match="same reward"):
        value_metrics(
            lambda b: value_sums(zeros, b["rewards"], b["rewarded"], b["segment_ids"], discount=1.0), [batch]
        )


def gradients(parameters, batch, **options):
    objective = Objective(**{"weighting": CRITIC, "critic": Critic(), **options})
    return jax.jit(functools.partial(loss_and_gradients, definition=critic_model()[0], objective=objective))(
        parameters, batch
    )


@pytest.mark.parametrize("score", ["value_change", "advantage"])
def test_accumulation_equals_the_large_batch(score):
    _, parameters = critic_model()
    batch, critic = critic_batch(), Critic(score=score, discount=0.95)
    whole, parts = (gradients(parameters, batch, critic=critic, accumulation=count) for count in (1, 2))
    for name in ("loss", "value_loss"):
        assert float(getattr(parts, name)) == pytest.approx(float(getattr(whole, name)), rel=3e-6)
    mask = np.asarray(batch["mask"])
    np.testing.assert_allclose(np.asarray(parts.weights)[mask], np.asarray(whole.weights)[mask], rtol=1e-4, atol=1e-6)
    for one, other in zip(jax.tree.leaves(whole.gradients), jax.tree.leaves(parts.gradients), strict=True):
        np.testing.assert_allclose(other, one, atol=3e-6 * max(1.0, float(jnp.abs(one).max())))


def test_weights_are_those_of_the_values():
    """exp of the standardised value change at each head's own target, by NumPy; mean one in every head."""
    _, parameters = critic_model()
    batch = critic_batch()
    done = gradients(parameters, batch)
    values, ids, mask = values_of(parameters, batch), np.asarray(batch["segment_ids"]), np.asarray(batch["mask"])
    change = np.zeros((B, S))
    for b in range(B):
        for t in range(S):
            if ids[b, t]:
                before = values[b, t - 1] if t and ids[b, t - 1] == ids[b, t] else 0.0
                change[b, t] = values[b, t] - before
    for k in range(mask.shape[-1]):
        score = np.zeros((B, S))
        score[:, : S - 1 - k] = change[:, 1 + k :]
        valid = score[mask[..., k]]
        weight = np.clip(np.exp((valid - valid.mean()) / valid.std()), 0.1, 3.0)
        np.testing.assert_allclose(np.asarray(done.weights)[..., k][mask[..., k]], weight / weight.mean(), rtol=2e-4)


def test_unsigned_scores_weigh_by_magnitude():
    _, parameters = critic_model()
    batch = critic_batch()
    signed, magnitude = (
        gradients(parameters, batch, weighting=Weighting(algorithm="critic-wmtp", form="top_fraction", fraction=0.2, signed=sign))
        for sign in (True, False)
    )
    assert not np.array_equal(signed.weights > 0, magnitude.weights > 0)


def test_the_value_loss_stays_out_of_the_trunk_unless_asked():
    _, parameters = critic_model()
    batch = critic_batch()

    def of(critic):
        done = gradients(parameters, batch, critic=critic).gradients
        head = done.pop("value_head")
        return done, head

    (without, no_head), (beside, head), (through, _) = map(
        of, (Critic(coefficient=0.0), Critic(coefficient=2.0), Critic(coefficient=2.0, train_trunk=True))
    )
    for one, other in zip(jax.tree.leaves(without), jax.tree.leaves(beside), strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(no_head))
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(head))
    assert float(jnp.abs(through["embedding"] - beside["embedding"]).max()) > 1e-6


def test_with_equal_weights_the_critic_is_the_baseline():
    """20 updates, the value head learning beside them: the same losses within 5e-6 relative. Two compiled programs round
    differently, and each update starts from what the one before rounded: 1.6e-6 was seen."""
    curves = {}
    for name, settings in {
        "baseline": Weighting(), "critic": Weighting(algorithm="critic-wmtp", temperature=1e9)
    }.items():  # fmt: skip
        critic = Critic() if settings.needs_values else None
        definition, parameters = critic_model()
        if critic is None:
            definition, _ = initial_parameters(SETTINGS, 0)
            parameters = {key: leaf for key, leaf in parameters.items() if key != "value_head"}
        optimizer = make_optimizer(OPTIMIZER, 20, value_learning_rate=3e-2)
        step = jax.jit(
            functools.partial(
                train_step, definition=definition, optimizer=optimizer, objective=Objective(settings, critic=critic)
            )
        )
        state, curves[name] = initial_state(parameters, optimizer), []
        for seed in range(20):
            state, metrics = step(state, critic_batch(seed), None)
            curves[name].append(float(metrics.loss))
    np.testing.assert_allclose(curves["critic"], curves["baseline"], rtol=5e-6)
    assert float(metrics.value_loss) > 0


def test_stage_1_fits_the_rewards_and_leaves_the_model_alone():
    """On one batch, repeated: the loss falls towards what an R-return can be fitted to; only the value head is in the state."""
    definition, parameters = critic_model()
    trunk = {name: leaf for name, leaf in parameters.items() if name != "value_head"}
    optimizer = make_optimizer(OPTIMIZER, 100, value_learning_rate=3e-2)
    batch = critic_batch()
    step = jax.jit(
        functools.partial(value_step, definition=definition, optimizer=optimizer, critic=Critic(decay=1.0))
    )
    state, losses = initial_state({"value_head": parameters["value_head"]}, optimizer), []
    for _ in range(100):
        state, metrics = step(state, batch, trunk)
        losses.append(float(metrics.value_loss))
    assert losses[-1] < 0.3 * losses[0]
    assert set(state.parameters) == {"value_head"} and int(state.step) == 100


def test_stage_1_in_parts_equals_the_whole():
    definition, parameters = critic_model()
    trunk = {name: leaf for name, leaf in parameters.items() if name != "value_head"}
    start, batch = {"value_head": parameters["value_head"]}, critic_batch()
    ends = []
    for accumulation in (1, 2):
        step = functools.partial(
            value_step, definition=definition, optimizer=optax.sgd(0.1), critic=Critic(), accumulation=accumulation
        )
        ends.append(jax.jit(step)(initial_state(start, optax.sgd(0.1)), batch, trunk)[0].parameters)
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_non_finite_reward_leaves_the_head_as_it_was():
    definition, parameters = critic_model()
    trunk = {name: leaf for name, leaf in parameters.items() if name != "value_head"}
    optimizer = make_optimizer(OPTIMIZER, 10, value_learning_rate=3e-2)
    state = initial_state({"value_head": parameters["value_head"]}, optimizer)
    batch = critic_batch()
    batch["rewards"] = batch["rewards"].at[1, 8].set(jnp.inf)
    after, metrics = jax.jit(
        functools.partial(value_step, definition=definition, optimizer=optimizer, critic=Critic())
    )(state, batch, trunk)
    assert not bool(metrics.finite) and (int(after.step), int(after.skipped)) == (1, 1)
    for old, new in zip(jax.tree.leaves(state[2:]), jax.tree.leaves(after[2:]), strict=True):
        np.testing.assert_array_equal(old, new)


def test_inspected_tokens_hold_values():
    definition, parameters = critic_model()
    batch = critic_batch()
    objective = Objective(CRITIC, critic=Critic())
    entries = inspect_tokens(parameters, batch, None, 0, definition=definition, objective=objective)
    np.testing.assert_allclose(entries["value"], values_of(parameters, batch), atol=1e-5)
    mask = np.asarray(batch["mask"])
    np.testing.assert_allclose(
        np.asarray(entries["weight"])[mask], np.asarray(gradients(parameters, batch).weights)[mask], rtol=1e-4
    )
