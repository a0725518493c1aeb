"""The idea, checked: where a reward hangs on one token in a hundred, the critic's first stage finds that token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmtp_jax.data.targets import shift_targets
from wmtp_jax.losses import TokenStatistics
from wmtp_jax.model import ModelSettings, initial_parameters, merge
from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.settings import Critic, Optimizer, Weighting
from wmtp_jax.train_step import (
    initial_state,
    shared_states,
    token_score,
    token_values,
    token_weights,
    train_step,
    value_step,
)
from wmtp_jax.update import Objective

pytestmark = pytest.mark.slow

B, S, V = 32, 100, 24
GOOD, BAD = V - 2, V - 1
SETTINGS = ModelSettings(
    vocabulary_size=V, width=32, layers=2, attention_heads=2, kv_heads=2, head_dim=16, mlp_width=64, max_positions=S,
    num_heads=1, head_kind="linear",
)  # fmt: skip
OPTIMIZER = Optimizer(
    name="adamw", learning_rate=5e-3, muon_learning_rate=0.02, b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.0,
    clip_norm=1.0, schedule="cosine", warmup_steps=10, decay_fraction=0.2, final_fraction=0.1,
)  # fmt: skip
STEPS = 300


def make_batch(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of one segment: noise, then GOOD or BAD somewhere in the middle, then noise that leans a little towards either
    half of the vocabulary. The reward is 1 or -1 by that one token; the lean is what makes a language model remember it.
    """
    random = np.random.default_rng(seed)
    where, good = random.integers(20, 80, B), random.random(B) < 0.5
    noise = random.integers(0, GOOD, (B, S))
    half = GOOD // 2
    leaning = np.where(random.random((B, S)) < 0.7, noise % half + np.where(good, 0, half)[:, None], noise)
    index = np.arange(S)
    tokens = np.where(index > where[:, None], leaning, noise)
    tokens[np.arange(B), where] = np.where(good, GOOD, BAD)
    ids = np.ones((B, S), np.int32)
    targets, mask = shift_targets(tokens, ids, num_heads=1)
    rewards = np.zeros((B, S), np.float32)
    rewards[:, -1] = np.where(good, 1.0, -1.0)
    batch = {
        "tokens": tokens.astype(np.int32), "segment_ids": ids, "positions": np.tile(index, (B, 1)).astype(np.int32),
        "targets": targets, "mask": mask, "rewards": rewards, "rewarded": np.ones((B, S), bool),
    }  # fmt: skip
    return batch, where


@pytest.fixture(scope="module")
def trained():
    """A small language model of such rows, and a value head learned on it with the model frozen."""
    definition, parameters = initial_parameters(SETTINGS, 0)
    optimizer = make_optimizer(OPTIMIZER, STEPS, value_learning_rate=5e-3)
    options = {"definition": definition, "optimizer": optimizer, "objective": Objective(Weighting())}
    update = jax.jit(functools.partial(train_step, **options), donate_argnums=0)
    state = initial_state(parameters, optimizer)
    for seed in range(STEPS):
        state, _ = update(state, make_batch(seed)[0], None)
    trunk = state.parameters
    definition, parameters = initial_parameters(SETTINGS, 1, value_head=True)
    learn = jax.jit(
        functools.partial(value_step, definition=definition, optimizer=optimizer, critic=Critic()), donate_argnums=0
    )
    head = initial_state({"value_head": parameters["value_head"]}, optimizer)
    for seed in range(STEPS):
        head, _ = learn(head, make_batch(10_000 + seed)[0], trunk)
    return merge(definition, {**trunk, **head.parameters})


def weights_of(model, batch, *, signed: bool) -> np.ndarray:
    """The weight of every target, `[B, S]`: entry t weighs token t."""
    values = token_values(model, shared_states(model, batch))
    score = token_score(values, batch["rewards"], batch["segment_ids"], critic=Critic())
    nothing = jnp.zeros(batch["mask"].shape)
    weights = token_weights(
        Weighting(algorithm="critic-wmtp", signed=signed), TokenStatistics(nothing, nothing, nothing), batch["mask"],
        token_score=score,
    )  # fmt: skip
    return np.pad(np.asarray(weights)[:, :-1, 0], ((0, 0), (1, 0)))


def test_the_token_that_the_reward_hangs_on_gets_the_weight(trained):
    """Among the top 5% of the batch's weights at 95% of the places: by magnitude wherever it stands; signed, where it is the
    good one, and among the lowest where it is the bad one."""
    magnitude, signed, is_good = [], [], []
    for seed in range(4):
        batch, where = make_batch(50_000 + seed)
        rows = np.arange(B)
        for ranks, sign in ((magnitude, False), (signed, True)):
            weights = weights_of(trained, batch, signed=sign)
            below = (weights[:, 1:].reshape(-1)[None] < weights[rows, where][:, None]).mean(axis=1)
            ranks.extend(below)
        is_good.extend(batch["tokens"][rows, where] == GOOD)
    magnitude, signed, is_good = map(np.array, (magnitude, signed, is_good))
    assert (magnitude >= 0.95).mean() >= 0.95, np.quantile(magnitude, (0.02, 0.05, 0.1))
    assert (signed[is_good] >= 0.95).mean() >= 0.95
    assert (signed[~is_good] <= 0.05).mean() >= 0.95


def test_without_a_trained_value_head_it_would_not_be_found(trained):
    """The control: the same measure on a head that has learned nothing."""
    definition, parameters = initial_parameters(SETTINGS, 1, value_head=True)
    outer = parameters["value_head"]["outer"]
    outer["kernel"] = jax.random.normal(jax.random.key(3), outer["kernel"].shape)
    batch, where = make_batch(50_000)
    weights = weights_of(merge(definition, parameters), batch, signed=False)
    below = (weights[:, 1:].reshape(-1)[None] < weights[np.arange(B), where][:, None]).mean(axis=1)
    assert (below >= 0.95).mean() < 0.5
