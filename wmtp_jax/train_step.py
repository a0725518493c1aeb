"""One update: statistics -> weights -> loss -> gradients -> parameters. Pure functions of arrays and frozen settings.

Every algorithm takes the same path and differs in one call, `token_weights`; so clipping, accumulation, numerics and the
treatment of non-finite values cannot differ between them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from wmtp_jax import weighting
from wmtp_jax.algorithms import token_weights
from wmtp_jax.critic import token_score, value_loss
from wmtp_jax.losses import TokenStatistics, token_statistics, weighted_mean
from wmtp_jax.model import Model, Parameters, merge, separate, unite
from wmtp_jax.parallel import sharding
from wmtp_jax.settings import Critic
from wmtp_jax.trainable import ALL, Trainable
from wmtp_jax.update import Objective, StepMetrics, ValueMetrics, WeightedLoss, step_metrics

Array = jax.Array
# tokens, segment_ids, positions [B, S]; targets, mask [B, S, H]; where they were scored beforehand, reference_loss [B, S]:
# entry t is -log P(x[t] | x[<t]), 0 at a segment's first token; where it is read, reference_entropy [B, S], that of P(. | x[<t]).
# With a critic, rewards [B, S], a segment's at its last token and 0 elsewhere, and rewarded [B, S] bool, the tokens of the
# segments that have one. See data/ and rewards.py.
Batch = dict[str, Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parameters"], meta_fields=["definition"])
@dataclasses.dataclass(frozen=True)
class Reference:
    """A frozen model that tells how hard a token is: its structure, static in a compiled function, and its parameters."""

    definition: nnx.GraphDef
    parameters: Parameters


class TrainState(NamedTuple):
    """All that an update changes. `step` counts completed updates, `skipped` those left out as non-finite (int32)."""

    step: Array
    skipped: Array
    parameters: Parameters
    optimizer_state: Any


# ---- statistics ----------------------------------------------------------------------------------------------------


def head_statistics(model: Model, batch: Batch, *, chunk_size: int | None = None) -> TokenStatistics:
    """Loss, entropy and Σp² of every (position, head), each `[B, S, H]` float32; H from `batch["targets"]`.

    The loss is differentiable in the model's parameters, the others are not. Entries behind the mask are finite and mean
    nothing.
    """
    return _statistics_and_states(model, batch, chunk_size=chunk_size)[0]


def token_values(model: Model, shared: Array, *, train_trunk: bool = False) -> Array:
    """The value after every token, `[B, S]` float32, from the hidden states that the heads share, `[B, S, D]`.

    `train_trunk` lets gradients pass into those states.
    """
    return model.value_head(shared if train_trunk else jax.lax.stop_gradient(shared))  # pyrefly: ignore[not-callable]  # where there are values


def shared_states(model: Model, batch: Batch) -> Array:
    """The hidden states that the heads share, `[B, S, D]`."""
    return model.trunk(batch["tokens"], batch["positions"], model.context(batch["segment_ids"], batch["positions"]))


def _statistics_and_states(model: Model, batch: Batch, *, chunk_size: int | None) -> tuple[TokenStatistics, Array]:
    context = model.context(batch["segment_ids"], batch["positions"])
    shared = model.trunk(batch["tokens"], batch["positions"], context)
    targets = batch["targets"]
    groups, start = [], 0
    for states, unembedding in model.head_groups(shared, batch["tokens"], context, num_heads=targets.shape[-1]):
        stop = start + (unembedding.shape[0] if unembedding.ndim == 3 else states.shape[-2])
        narrow = unembedding.astype(states.dtype)
        groups.append(token_statistics(states, narrow, targets[..., start:stop], chunk_size=chunk_size))
        start = stop
    return TokenStatistics(*(jnp.concatenate(parts, axis=-1) for parts in zip(*groups, strict=True))), shared


def reference_token_statistics(
    reference: Reference, batch: Batch, *, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """Loss and entropy of the reference at its next token, by token, `[B, S]` each and without gradient: entry t is
    -log P(x[t] | x[<t]) and the entropy of P(. | x[<t]), both 0 at a segment's first token."""
    next_token = {**batch, "targets": batch["targets"][..., :1]}
    loss, entropy, _ = _reference_statistics(reference, next_token, chunk_size=chunk_size)

    def by_token(entries: Array) -> Array:
        # The head at position t - 1 predicts token x[t].
        return jnp.pad(jnp.where(batch["positions"][:, 1:] > 0, entries[:, :-1, 0], 0.0), ((0, 0), (1, 0)))

    return by_token(loss), by_token(entropy)


def _reference_statistics(reference: Reference, batch: Batch, *, chunk_size: int | None) -> TokenStatistics:
    model = merge(reference.definition, jax.lax.stop_gradient(reference.parameters))
    return jax.lax.stop_gradient(head_statistics(model, batch, chunk_size=chunk_size))


def reference_entries(reference: Reference | None, batch: Batch, objective: Objective) -> dict[str, Array]:
    """What the weights read of the reference by (position, head), `[B, S, H]` each and without gradient: the columns
    `Weighting.reference_columns`, `reference_loss` about the target and `reference_entropy` of the distribution that predicts it.

    Columns that the batch brings are aligned to heads. Else the reference computes them: by `next_token`, for target x[s+1+k]
    from its own prefix x[<= s+k]; by `same_prefix`, from x[<= s] and the reference's own head k.
    """
    names = objective.weighting.reference_columns
    if not names:
        return {}
    if names[0] in batch:
        by_token = tuple(batch[name] for name in names)
    else:
        assert reference is not None
        if objective.alignment == "same_prefix":
            of_heads = _reference_statistics(reference, batch, chunk_size=objective.chunk_size)
            return dict(zip(names, of_heads, strict=False))
        by_token = reference_token_statistics(reference, batch, chunk_size=objective.chunk_size)
    heads = batch["mask"].shape[-1]
    return {name: weighting.align_to_heads(x, num_heads=heads) for name, x in zip(names, by_token, strict=False)}


# ---- weights -------------------------------------------------------------------------------------------------------


def batch_weights(
    objective: Objective,
    statistics: TokenStatistics,
    batch: Batch,
    reference: dict[str, Array],
    values: Array | None,
    step: Array | int,
) -> Array:
    """The weights of an update after `step` others, `[B, S, H]` and without gradient: the algorithm's, then what holds for all of
    them. `reference` as `reference_entries` gives it, `values` as `token_values` does."""
    settings, mask, score = objective.weighting, batch["mask"], None
    if settings.needs_values:
        values = jax.lax.stop_gradient(values)
        score = token_score(values, batch["rewards"], batch["segment_ids"], critic=objective.critic)
    weights = token_weights(settings, statistics, mask, token_score=score, **reference)
    if settings.permute:
        noise = jax.random.uniform(jax.random.fold_in(jax.random.key(objective.seed), step), mask.shape)
        weights = weighting.permute(weights, mask, noise)
    if settings.start_step:
        weights = jnp.where(step < settings.start_step, weighting.uniform(mask), weights)
    return jax.lax.stop_gradient(weights)


# ---- loss and gradients --------------------------------------------------------------------------------------------


def loss_and_gradients(
    parameters: Parameters,
    batch: Batch,
    reference: Reference | None = None,
    step: Array | int = 0,
    *,
    definition: nnx.GraphDef,
    objective: Objective,
) -> WeightedLoss:
    """The weighted loss of a batch and its gradient in the parameters that are trained.

    With A = `objective.accumulation` > 1 the rows go through in A parts; loss and gradient are those of the whole batch up to
    rounding. Weights of batch or head scope then cost one more forward pass, which collects the statistics first.

    Args:
      parameters: of the model.
      batch: see `Batch`; B a multiple of the accumulation.
      reference: the reference model, where the algorithm needs one and the batch holds no stored losses.
      step: completed updates.
      definition: the model's structure.
      objective: what is minimised.
    """
    critic, accumulation = objective.critic, objective.accumulation
    trained, frozen = separate(parameters, objective.trainable)

    # With padding, heads and parts have different numbers of valid entries: one global denominator keeps the mean a mean.
    denominator = batch["mask"].sum().astype(jnp.float32)
    value_denominator = batch["rewarded"].sum().astype(jnp.float32) if critic else None

    def forward(trained: Parameters, part: Batch) -> tuple[TokenStatistics, Array | None]:
        model = merge(definition, unite(trained, frozen))
        statistics, shared = _statistics_and_states(model, part, chunk_size=objective.chunk_size)
        return statistics, token_values(model, shared, train_trunk=critic.train_trunk) if critic else None

    def loss_of(trained: Parameters, part: Batch, given: Array | None) -> tuple[Array, tuple[tuple, tuple]]:
        statistics, values = forward(trained, part)
        weights = given
        if weights is None:
            known = reference_entries(reference, part, objective)
            weights = batch_weights(objective, statistics, part, known, values, step)
        loss = weighted_mean(statistics.loss, weights, part["mask"], denominator=denominator)
        of_values = jnp.zeros_like(loss)
        if critic:
            columns = (part["rewards"], part["rewarded"], part["segment_ids"])
            of_values = value_loss(values, *columns, critic=critic, denominator=value_denominator)
        total = loss + (critic.coefficient if critic else 0.0) * of_values
        return total, ((loss, of_values), (jax.lax.stop_gradient(statistics.loss), weights))

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if accumulation == 1:
        (_, (sums, entries)), gradients = value_and_grad(trained, batch, None)
        return WeightedLoss(*sums, gradients, *entries)  # pyrefly: ignore[bad-argument-count]  # two and two

    batches, whole = _parts(batch, accumulation)
    given = None
    if not objective.weighting.is_local:
        # A weight that ranks or standardises over the batch needs every loss of it. A forward pass collects what weights are made
        # of; the logits are made again in the weighted pass, so that memory stays that of one part.

        def collect(_: None, part: Batch) -> tuple[None, tuple[TokenStatistics, dict[str, Array], Array | None]]:
            statistics, values = forward(trained, part)
            return None, jax.lax.stop_gradient((statistics, reference_entries(reference, part, objective), values))

        _, collected = jax.lax.scan(collect, None, batches)
        statistics, known, values = jax.tree.map(whole, collected)
        given = _parts(batch_weights(objective, statistics, batch, known, values, step), accumulation)[0]

    def sums_and_gradients(part: Batch, given: Array | None) -> tuple[tuple[tuple, Parameters], tuple]:
        (_, (sums, entries)), gradients = value_and_grad(trained, part, given)
        return (sums, gradients), entries

    zero = jnp.zeros((), jnp.float32)
    (sums, gradients), entries = _accumulated(sums_and_gradients, trained, (batches, given), start=(zero, zero))
    return WeightedLoss(*sums, gradients, *jax.tree.map(whole, entries))  # pyrefly: ignore[bad-argument-count]  # two and two


def _accumulated(function: Callable, trained: Parameters, parts: Any, *, start: Any) -> tuple[tuple[Any, Parameters], Any]:
    """Sums and gradients over micro-batches, and the other results of each.

    Over `data` the parts of the rows keep sums and gradients of their own, that are reduced once, after the last micro-batch.

    Args:
      function: of one micro-batch -> `(sums, gradients), entries`.
      trained: what the gradients are in.
      parts: arrays `[A, B / A, ...]`, in a tree.
      start: zeros like `sums`.

    Returns:
      The sums and the gradients, and `entries` as `[A, B / A, ...]`.
    """
    count, grouped = sharding.data_parts(), lambda x: x
    zeros = jax.tree.map(jnp.zeros_like, trained)
    if count > 1:
        grouped = lambda x: x.reshape(count, -1, *x.shape[1:])  # noqa: E731
        function, zeros = sharding.apart(function), sharding.stacked(trained)
        start = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), start)

    def add(carry: Any, part: Any) -> tuple[Any, Any]:
        found, entries = function(*jax.tree.map(grouped, part))
        return jax.tree.map(jnp.add, carry, found), entries

    found, entries = jax.lax.scan(add, (start, zeros), parts)
    if count > 1:
        found = jax.tree.map(lambda x: x.sum(axis=0), found)
        entries = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), entries)
    return found, entries


def _parts(tree: Any, count: int) -> tuple[Any, Callable[[Array], Array]]:
    """Arrays `[B, ...]` as `[count, B / count, ...]`, and the way back for one of them."""

    # Row r goes to part r % count: rows that lie on one device stay there when the batch is sharded.
    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def whole(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(cut, tree), whole


# ---- the update ----------------------------------------------------------------------------------------------------


def train_step(
    state: TrainState,
    batch: Batch,
    reference: Reference | None,
    *,
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
) -> tuple[TrainState, StepMetrics]:
    """One update of the parameters that are trained. Where loss or gradient is not finite, parameters and optimizer stay as
    they were and `finite` is False. Arguments as in `loss_and_gradients`."""
    done = loss_and_gradients(state.parameters, batch, reference, state.step, definition=definition, objective=objective)
    state, finite = _apply(state, done.loss + done.value_loss, done.gradients, optimizer, objective.trainable)
    # Of the model alone: a figure that means the same for every algorithm.
    norm = optax.tree.norm({k: v for k, v in done.gradients.items() if k != "value_head"})
    return state, step_metrics(done, batch["mask"], grad_norm=norm, finite=finite)


def value_step(
    state: TrainState,
    batch: Batch,
    trunk_parameters: Parameters,
    *,
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    critic: Critic,
    accumulation: int = 1,
) -> tuple[TrainState, ValueMetrics]:
    """One update of the value head on a frozen model: the critic's first stage. No head makes a logit.

    Args:
      state: its parameters are `{"value_head": ...}` and nothing else.
      batch: with `rewards` and `rewarded`; see `Batch`.
      trunk_parameters: of the model without its value head; they stay as they are.
      definition: of the model with its value head.
      optimizer: for `state.parameters`.
      critic: discount and decay of the returns.
      accumulation: parts that the rows go through in.
    """
    denominator = batch["rewarded"].sum().astype(jnp.float32)

    def objective(parameters: Parameters, part: Batch) -> Array:
        model = merge(definition, {**trunk_parameters, **parameters})
        values = token_values(model, shared_states(model, part))
        return value_loss(
            values, part["rewards"], part["rewarded"], part["segment_ids"], critic=critic, denominator=denominator
        )

    def of_values(part: Batch) -> tuple[tuple[Array, Parameters], None]:
        return jax.value_and_grad(objective)(state.parameters, part), None

    batches, zero = _parts(batch, accumulation)[0], jnp.zeros((), jnp.float32)
    (loss, gradients), _ = _accumulated(of_values, state.parameters, (batches,), start=zero)
    state, finite = _apply(state, loss, gradients, optimizer)
    return state, ValueMetrics(loss, optax.tree.norm(gradients), finite)


def _apply(
    state: TrainState,
    loss: Array,
    gradients: Parameters,
    optimizer: optax.GradientTransformation,
    trainable: Trainable = ALL,
) -> tuple[TrainState, Array]:
    """The state after an update, or as it was but counted where loss or gradient is not finite, and which of the two."""
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients))
    trained, frozen = separate(state.parameters, trainable)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, trained)
    updated = (optax.apply_updates(trained, updates), optimizer_state)
    trained, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, (trained, state.optimizer_state)
    )
    skipped = state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
    return TrainState(state.step + 1, skipped, unite(trained, frozen), optimizer_state), finite


def inspect_tokens(
    parameters: Parameters,
    batch: Batch,
    reference: Reference | None,
    step: Array | int,
    *,
    definition: nnx.GraphDef,
    objective: Objective,
) -> dict[str, Array]:
    """What the weights of a batch are made of, for the token map: `loss`, `entropy`, `weight` and what is read of a
    reference (`reference_loss`, `reference_entropy`), each `[B, S, H]`; with a critic, `value [B, S]`. The weights are those
    that an update after `step` would use, in the scopes of this batch; entries behind the mask mean nothing."""
    model = merge(definition, parameters)
    statistics, shared = _statistics_and_states(model, batch, chunk_size=objective.chunk_size)
    known = reference_entries(reference, batch, objective)
    entries = {"loss": statistics.loss, "entropy": statistics.entropy, **known}
    values = None
    if objective.critic:
        values = entries["value"] = token_values(model, shared)
    entries["weight"] = batch_weights(objective, statistics, batch, known, values, jnp.asarray(step))
    return entries


def initial_state(
    parameters: Parameters, optimizer: optax.GradientTransformation, trainable: Trainable = ALL
) -> TrainState:
    """The state before the first update; the optimizer keeps nothing of what is not trained."""
    # Two arrays, not one twice: the update takes over the memory of each.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, skipped, parameters, optimizer.init(separate(parameters, trainable)[0]))
