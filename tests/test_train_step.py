"""The update: alignment of references, accumulation, equal weights, and what happens to values that are not finite."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from wmtp_jax.data.targets import positions, shift_targets
from wmtp_jax.model import Model, ModelSettings, merge, split
from wmtp_jax.parallel.placement import Placement
from wmtp_jax.run.train import jit_update
from wmtp_jax.settings import Weighting
from wmtp_jax.train_step import (
    Reference,
    head_statistics,
    initial_state,
    inspect_tokens,
    loss_and_gradients,
    reference_entries,
    train_step,
)
from wmtp_jax.update import Objective

B, S, H, V = 4, 16, 3, 40
SETTINGS = ModelSettings(
    vocabulary_size=V, width=16, layers=2, attention_heads=2, kv_heads=1, head_dim=8, mlp_width=32, max_positions=S,
    num_heads=H, head_kind="linear", initial_scale=0.3,
)  # fmt: skip
ALGORITHMS = {
    "baseline": Weighting(),
    "tokenskip": Weighting(algorithm="rho1-tokenskip"),
    "weighted": Weighting(algorithm="rho1-weighted"),
    "weighted-softmax": Weighting(algorithm="rho1-weighted", form="softmax_over_heads"),
    "weighted-sequence": Weighting(algorithm="rho1-weighted", scope="sequence"),
    "tokenskip-batch": Weighting(algorithm="rho1-tokenskip", scope="batch"),
    "tokenskip-both": Weighting(algorithm="rho1-tokenskip", score="reference_both"),
    "confidence": Weighting(algorithm="confidence"),
    "focal-position": Weighting(algorithm="focal", scope="position"),
    "entropy": Weighting(algorithm="entropy", scope="batch"),
    "gradient": Weighting(algorithm="gradient"),
    "head-decay": Weighting(algorithm="head-decay"),
    "hybrid": Weighting(algorithm="hybrid", members=("entropy", "head-decay"), coefficients=(0.5, 0.5)),
    "permuted": Weighting(algorithm="confidence", permute=True),
}


def make_batch(seed: int = 0) -> dict[str, jax.Array]:
    """Rows with several segments and padding, differently in each, so that micro-batches have different Σ m."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, V, (B, S))
    segments = np.ones((B, S), int)
    segments[0, 5:] = 2
    segments[1, 9:] = 0
    segments[2, 3:7], segments[2, 7:] = 2, 3
    targets, mask = shift_targets(tokens, segments, num_heads=H)
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions(segments), "targets": targets, "mask": mask}
    return {name: jnp.asarray(value) for name, value in batch.items()}


@functools.cache
def make_model(seed: int = 0, num_heads: int = H):
    return split(Model(dataclasses.replace(SETTINGS, num_heads=num_heads), rngs=nnx.Rngs(seed)))


@functools.cache
def make_reference(num_heads: int = 1) -> Reference:
    return Reference(*make_model(7, num_heads))


@functools.cache
def gradients_of(name: str, accumulation: int):
    definition, _ = make_model()
    return jax.jit(
        functools.partial(
            loss_and_gradients,
            definition=definition,
            reference=make_reference() if name.startswith(("tokenskip", "weighted")) else None,
            objective=Objective(ALGORITHMS[name], accumulation=accumulation),
        )
    )


def test_statistics_agree_with_the_logits():
    definition, parameters = make_model()
    batch = make_batch()
    model = merge(definition, parameters)
    statistics = head_statistics(model, batch)
    logits = model.logits(batch["tokens"], batch["segment_ids"], batch["positions"])
    log_p = jax.nn.log_softmax(logits)
    expected = -jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(statistics.loss, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(statistics.entropy, -(jnp.exp(log_p) * log_p).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alignment", ["next_token", "same_prefix"])
def test_reference_loss_is_the_loss_of_the_same_target(alignment):
    """Literal loops over the reference's own logits; entries behind the mask mean nothing."""
    reference = make_reference(H if alignment == "same_prefix" else 1)
    batch = make_batch()
    objective = Objective(Weighting(algorithm="rho1-weighted"), alignment)
    got = np.asarray(reference_entries(reference, batch, objective)["reference_loss"])
    logits = merge(reference.definition, reference.parameters).logits(batch["tokens"], batch["segment_ids"], batch["positions"])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    tokens, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"])
    checked = 0
    for b in range(B):
        for s in range(S):
            for k in range(H):
                if not mask[b, s, k]:
                    continue
                prefix_end, head = (s + k, 0) if alignment == "next_token" else (s, k)
                expected = -log_p[b, prefix_end, head, tokens[b, s + 1 + k]]
                assert got[b, s, k] == pytest.approx(expected, abs=2e-5)
                checked += 1
    assert checked == mask.sum() > 100


@pytest.mark.parametrize("name", ALGORITHMS)
def test_accumulation_equals_the_large_batch(name):
    """Loss, gradients and weights, within the rounding of a float32 sum in another order (3e-6 of the largest entry)."""
    _, parameters = make_model()
    batch = make_batch()
    loss, _, gradients, losses, weights = gradients_of(name, 1)(parameters, batch)
    loss_2, _, gradients_2, losses_2, weights_2 = gradients_of(name, 2)(parameters, batch)
    assert float(loss_2) == pytest.approx(float(loss), rel=2e-6)
    mask = np.asarray(batch["mask"])
    np.testing.assert_allclose(np.asarray(losses_2)[mask], np.asarray(losses)[mask], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(weights_2)[mask], np.asarray(weights)[mask], rtol=1e-4, atol=1e-6)
    for leaf, leaf_2 in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_2), strict=True):
        np.testing.assert_allclose(leaf_2, leaf, atol=3e-6 * max(1.0, float(jnp.abs(leaf).max())))


@pytest.mark.parametrize("name", ["tokenskip", "weighted", "confidence", "permuted", "hybrid"])
def test_loss_is_the_weighted_mean_of_the_losses(name):
    """Σ m w CE / Σ m by a literal sum, and weights of mean one: no algorithm changes the learning rate in secret."""
    _, parameters = make_model()
    batch = make_batch()
    loss, _, _, losses, weights = gradients_of(name, 1)(parameters, batch)
    mask = np.asarray(batch["mask"])
    losses, weights = np.asarray(losses, np.float64), np.asarray(weights, np.float64)
    assert float(loss) == pytest.approx((losses * weights)[mask].sum() / mask.sum(), rel=1e-5)
    assert weights[mask].mean() == pytest.approx(1.0, abs=1e-5)
    assert weights[mask].std() > 0.05


EQUAL = [
    Weighting(algorithm="rho1-tokenskip", fraction=1.0),
    Weighting(algorithm="rho1-weighted", temperature=1e9),
    Weighting(algorithm="rho1-weighted", form="softmax_over_heads", softmax_temperature=1e9),
    Weighting(algorithm="focal", gamma=0.0),
    Weighting(algorithm="head-decay", decay=1.0),
    Weighting(algorithm="gradient", temperature=1e9),
    Weighting(algorithm="confidence", start_step=10),
]


@pytest.mark.parametrize("settings", EQUAL, ids=lambda s: f"{s.algorithm}-{s.form}")
def test_with_equal_weights_every_algorithm_is_the_baseline(settings):
    """20 updates: the same losses within 1e-6 relative."""
    batches = [make_batch(seed) for seed in range(20)]

    def losses(settings: Weighting) -> list[float]:
        definition, parameters = make_model()
        optimizer = optax.adamw(1e-2)
        reference = make_reference() if settings.algorithm.startswith("rho1") else None
        step = jax.jit(
            functools.partial(
                train_step,
                definition=definition,
                optimizer=optimizer,
                objective=Objective(settings),
            )
        )
        state, curve = initial_state(parameters, optimizer), []
        for batch in batches[: 20 if settings.start_step == 0 else settings.start_step]:
            state, metrics = step(state, batch, reference)
            curve.append(float(metrics.loss))
        return curve

    curve = losses(settings)
    np.testing.assert_allclose(curve, _baseline_curve(losses)[: len(curve)], rtol=1e-6)


_curve: list[float] = []


def _baseline_curve(losses) -> list[float]:
    if not _curve:
        _curve.extend(losses(Weighting()))
    return _curve


def test_a_non_finite_update_is_left_out_and_counted():
    definition, parameters = make_model()
    optimizer = optax.adamw(1e-2)
    step = jax.jit(functools.partial(train_step, definition=definition, optimizer=optimizer, objective=Objective(Weighting())))
    broken = {**parameters, "embedding": parameters["embedding"].at[0, 0].set(jnp.nan)}
    batch = make_batch()
    batch["tokens"] = batch["tokens"].at[0, 0].set(0)
    state = initial_state(broken, optimizer)
    after, metrics = step(state, batch, None)
    assert not bool(metrics.finite)
    assert (int(after.step), int(after.skipped)) == (1, 1)
    for old, new in zip(jax.tree.leaves(state[2:]), jax.tree.leaves(after[2:]), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_all_masked_batch_changes_no_parameter_and_is_finite():
    definition, parameters = make_model()
    optimizer = optax.sgd(1.0)
    step = jax.jit(functools.partial(train_step, definition=definition, optimizer=optimizer, objective=Objective(Weighting())))
    batch = make_batch()
    batch["mask"] = jnp.zeros_like(batch["mask"])
    after, metrics = step(initial_state(parameters, optimizer), batch, None)
    assert float(metrics.loss) == 0.0 and bool(metrics.finite)
    for old, new in zip(jax.tree.leaves(parameters), jax.tree.leaves(after.parameters), strict=True):
        np.testing.assert_array_equal(old, new)


def test_inspected_weights_are_the_weights_of_the_update():
    definition, parameters = make_model()
    reference = make_reference()
    batch = make_batch()
    entries = inspect_tokens(
        parameters, batch, reference, 0, definition=definition, objective=Objective(ALGORITHMS["tokenskip"])
    )
    _, _, _, losses, weights = gradients_of("tokenskip", 1)(parameters, batch)
    mask = np.asarray(batch["mask"])
    np.testing.assert_array_equal(np.asarray(entries["weight"])[mask] > 0, np.asarray(weights)[mask] > 0)
    np.testing.assert_allclose(np.asarray(entries["loss"])[mask], np.asarray(losses)[mask], rtol=1e-5)


def test_stored_reference_losses_give_the_weights_of_the_reference():
    """Stored by token, as scoring leaves them: the same update, and no reference model in it."""
    definition, parameters = make_model()
    reference = make_reference()
    batch = make_batch()
    model = merge(reference.definition, reference.parameters)
    logits = model.logits(batch["tokens"], batch["segment_ids"], batch["positions"])[:, :, 0]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    tokens, place = np.asarray(batch["tokens"]), np.asarray(batch["positions"])
    stored = np.zeros((B, S), np.float32)
    for b in range(B):
        for t in range(1, S):
            if place[b, t] > 0:
                stored[b, t] = -log_p[b, t - 1, tokens[b, t]]
    _, _, _, _, expected = gradients_of("weighted", 1)(parameters, batch)
    _, _, _, _, got = loss_and_gradients(
        parameters,
        {**batch, "reference_loss": jnp.asarray(stored)},
        definition=definition,
        objective=Objective(ALGORITHMS["weighted"]),
    )
    mask = np.asarray(batch["mask"])
    np.testing.assert_allclose(np.asarray(got)[mask], np.asarray(expected)[mask], rtol=1e-4)


def test_reference_receives_no_gradient_and_keeps_its_parameters():
    definition, parameters = make_model()
    reference = make_reference()

    def loss(reference_parameters):
        return loss_and_gradients(
            parameters,
            make_batch(),
            Reference(reference.definition, reference_parameters),
            definition=definition,
            objective=Objective(ALGORITHMS["weighted"]),
        )[0]

    gradients = jax.jit(jax.grad(loss))(reference.parameters)
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(gradients))


def test_an_update_takes_over_the_memory_of_the_state():
    """What the trainer compiles: by the compiler's count, every array of the new state lies where the old one was."""
    definition, parameters = make_model()
    optimizer = optax.adamw(1e-3)
    state = initial_state(parameters, optimizer)
    step = functools.partial(train_step, definition=definition, optimizer=optimizer, objective=Objective(Weighting()))
    update = jit_update(Placement(jax.devices()[0]), step, state)
    memory = update.lower(state, make_batch(), None).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
