"""One update: statistics -> weights -> loss -> gradients -> parameters; the mirror of `wmtp_jax.train_step`.

Every algorithm takes the same path and differs in one call, `token_weights`. Nothing here waits for the device: what is not
finite is left out by arithmetic, and numbers are read by whoever logs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from wmtp_jax.algorithms import token_weights
from wmtp_jax.critic import token_score, value_loss
from wmtp_jax.settings import Critic
from wmtp_jax.trainable import ALL, Trainable
from wmtp_jax.update import Objective, StepMetrics, ValueMetrics, WeightedLoss, step_metrics
from wmtp_torch import weighting
from wmtp_torch.losses import TokenStatistics, token_statistics, weighted_mean
from wmtp_torch.model import Model, Parameters
from wmtp_torch.optimizer import Optimizer, OptimizerState, global_norm

Array = torch.Tensor
# As in wmtp_jax.train_step.
Batch = dict[str, Array]


class TrainState(NamedTuple):
    """All that an update changes, in place but for `step`, the completed updates; `skipped` counts those left out as
    non-finite (int32 scalar)."""

    step: int
    skipped: Array
    parameters: Parameters
    optimizer_state: OptimizerState


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
    return model.value_head(shared if train_trunk else shared.detach())  # pyrefly: ignore[not-callable]  # where there are values


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
        part = targets[..., start:stop]
        groups.append(token_statistics(states, unembedding.to(states.dtype), part, chunk_size=chunk_size))
        start = stop
    return TokenStatistics(*(torch.cat(parts, dim=-1) for parts in zip(*groups, strict=True))), shared


@torch.no_grad()
def reference_token_statistics(reference: Model, batch: Batch, *, chunk_size: int | None = None) -> tuple[Array, Array]:
    """Loss and entropy of the reference at its next token, by token, `[B, S]` each and without gradient: entry t is
    -log P(x[t] | x[<t]) and the entropy of P(. | x[<t]), both 0 at a segment's first token."""
    next_token = {**batch, "targets": batch["targets"][..., :1]}
    loss, entropy, _ = head_statistics(reference, next_token, chunk_size=chunk_size)

    def by_token(entries: Array) -> Array:
        # The head at position t - 1 predicts token x[t].
        return torch.nn.functional.pad(torch.where(batch["positions"][:, 1:] > 0, entries[:, :-1, 0], 0.0), (1, 0))

    return by_token(loss), by_token(entropy)


def reference_entries(reference: Model | None, batch: Batch, objective: Objective) -> dict[str, Array]:
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
            of_heads = torch.no_grad()(head_statistics)(reference, batch, chunk_size=objective.chunk_size)
            return dict(zip(names, of_heads, strict=False))
        by_token = reference_token_statistics(reference, batch, chunk_size=objective.chunk_size)
    heads = batch["mask"].shape[-1]
    return {name: weighting.align_to_heads(x, num_heads=heads) for name, x in zip(names, by_token, strict=False)}


# ---- weights -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def batch_weights(
    objective: Objective,
    statistics: TokenStatistics,
    batch: Batch,
    reference: dict[str, Array],
    values: Array | None,
    step: int,
) -> Array:
    """The weights of an update after `step` others, `[B, S, H]` and without gradient: the algorithm's, then what holds for all of
    them. `reference` as `reference_entries` gives it, `values` as `token_values` does."""
    settings, mask, score = objective.weighting, batch["mask"], None
    if step < settings.start_step:
        return weighting.uniform(mask)
    if settings.needs_values:
        score = token_score(values, batch["rewards"], batch["segment_ids"], critic=objective.critic)
    statistics = TokenStatistics(*(entry.detach() for entry in statistics))
    weights = token_weights(settings, statistics, mask, token_score=score, **reference)
    if settings.permute:
        # A function of (seed, step), as in JAX, but not the same numbers: the generators differ.
        generator = torch.Generator().manual_seed(objective.seed << 32 | step)
        noise = torch.rand(mask.shape, generator=generator).to(mask.device, non_blocking=True)
        weights = weighting.permute(weights, mask, noise)
    return weights


# ---- loss and gradients --------------------------------------------------------------------------------------------


def loss_and_gradients(
    model: Model, batch: Batch, reference: Model | None = None, step: int = 0, *, objective: Objective
) -> WeightedLoss:
    """The weighted loss of a batch and its gradient in the model's parameters that require one.

    With A = `objective.accumulation` > 1 the rows go through in A parts; loss and gradient are those of the whole batch up to
    rounding. Weights of batch or head scope then cost one more forward pass, which collects the statistics first.

    Args:
      model: with its parameters.
      batch: see `Batch`; B a multiple of the accumulation.
      reference: the reference model, where the algorithm needs one and the batch holds no stored losses.
      step: completed updates.
      objective: what is minimised.
    """
    critic, accumulation = objective.critic, objective.accumulation
    # With padding, heads and parts have different numbers of valid entries: one global denominator keeps the mean a mean.
    denominator = batch["mask"].sum().float()
    value_denominator = batch["rewarded"].sum().float() if critic else None

    def forward(part: Batch) -> tuple[TokenStatistics, Array | None]:
        statistics, shared = _statistics_and_states(model, part, chunk_size=objective.chunk_size)
        return statistics, token_values(model, shared, train_trunk=critic.train_trunk) if critic else None

    batches, given = _parts(batch, accumulation), [None] * accumulation
    if accumulation > 1 and not objective.weighting.is_local:
        # A weight that ranks or standardises over the batch needs every loss of it. A forward pass collects what weights are made
        # of; the logits are made again in the weighted pass, so that memory stays that of one part.
        with torch.no_grad():
            collected = [(*forward(part), reference_entries(reference, part, objective)) for part in batches]
        statistics, values, references = zip(*collected, strict=True)
        statistics = TokenStatistics(*map(_whole, zip(*statistics, strict=True)))
        known = {name: _whole([part[name] for part in references]) for name in references[0]}
        values = None if values[0] is None else _whole(values)
        weights = batch_weights(objective, statistics, batch, known, values, step)
        given = [part["weights"] for part in _parts({"weights": weights}, accumulation)]

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = of_values = torch.zeros_like(denominator)
    gradients, entries = {}, []
    for part, weights in zip(batches, given, strict=True):
        statistics, values = forward(part)
        if weights is None:
            known = reference_entries(reference, part, objective)
            weights = batch_weights(objective, statistics, part, known, values, step)
        part_loss = total = weighted_mean(statistics.loss, weights, part["mask"], denominator=denominator)
        if critic:
            part_value_loss = _part_value_loss(values, part, critic, value_denominator)
            total = part_loss + critic.coefficient * part_value_loss
            of_values = of_values + part_value_loss.detach()
        loss = loss + part_loss.detach()
        _add(gradients, parameters, total)
        entries.append((statistics.loss.detach(), weights))
    losses, weights = (_whole(parts) for parts in zip(*entries, strict=True))
    return WeightedLoss(loss, of_values, objective.trainable.trained(gradients), losses, weights)


def _part_value_loss(values: Array, part: Batch, critic: Critic, denominator: Array) -> Array:
    columns = (part[name] for name in ("rewards", "rewarded", "segment_ids"))
    return value_loss(values, *columns, critic=critic, denominator=denominator)


def _add(gradients: Parameters, parameters: Parameters, loss: Array) -> None:
    """Adds the gradient of `loss` in every parameter to `gradients`, which starts empty."""
    new = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    for name, gradient in zip(parameters, new, strict=True):
        gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient


def _parts(batch: Batch, count: int) -> list[Batch]:
    """The rows of a batch in `count` parts; row r goes to part r % count, as in JAX."""
    return [{name: x[number::count] for name, x in batch.items()} for number in range(count)]


def _whole(parts: Sequence[Array]) -> Array:
    """What `_parts` took apart."""
    return torch.stack(parts, dim=1).flatten(0, 1)


# ---- the update ----------------------------------------------------------------------------------------------------


def train_step(
    state: TrainState, batch: Batch, reference: Model | None, *, model: Model, optimizer: Optimizer, objective: Objective
) -> tuple[TrainState, StepMetrics]:
    """One update of the parameters that are trained. Where loss or gradient is not finite, parameters and optimizer stay as
    they were and `finite` is False. Arguments as in `loss_and_gradients`; `state.parameters` are those of `model`, changed in
    place."""
    done = loss_and_gradients(model, batch, reference, state.step, objective=objective)
    # Of the model alone: a figure that means the same for every algorithm. Before the update, which clips in place.
    norm = global_norm([g for name, g in done.gradients.items() if not name.startswith("value_head.")])
    state, finite = _apply(state, done.loss + done.value_loss, done.gradients, optimizer, objective.trainable)
    return state, step_metrics(done, batch["mask"], grad_norm=norm, finite=finite)


def value_step(
    state: TrainState, batch: Batch, *, model: Model, optimizer: Optimizer, critic: Critic, accumulation: int = 1
) -> tuple[TrainState, ValueMetrics]:
    """One update of the value head on a frozen model: the critic's first stage. No head makes a logit.

    Args:
      state: its parameters are those under `value_head.` and nothing else, changed in place.
      batch: with `rewards` and `rewarded`; see `Batch`.
      model: of which only the value head changes.
      optimizer: for `state.parameters`.
      critic: discount and decay of the returns.
      accumulation: parts that the rows go through in.
    """
    denominator = batch["rewarded"].sum().float()
    loss, gradients = torch.zeros_like(denominator), {}
    for part in _parts(batch, accumulation):
        values = token_values(model, torch.no_grad()(shared_states)(model, part))
        part_loss = _part_value_loss(values, part, critic, denominator)
        loss = loss + part_loss.detach()
        _add(gradients, state.parameters, part_loss)
    norm = global_norm(list(gradients.values()))
    state, finite = _apply(state, loss, gradients, optimizer)
    return state, ValueMetrics(loss, norm, finite)


def _apply(
    state: TrainState, loss: Array, gradients: Parameters, optimizer: Optimizer, trainable: Trainable = ALL
) -> tuple[TrainState, Array]:
    """The state after an update, or as it was but counted where loss or gradient is not finite, and which of the two."""
    finite = torch.isfinite(loss) & torch.isfinite(global_norm(list(gradients.values())))
    optimizer.update(trainable.trained(state.parameters), gradients, state.optimizer_state, finite=finite)
    return state._replace(step=state.step + 1, skipped=state.skipped + (~finite).int()), finite


@torch.no_grad()
def inspect_tokens(
    model: Model, batch: Batch, reference: Model | None, step: int, *, objective: Objective
) -> dict[str, Array]:
    """What the weights of a batch are made of, for the token map: `loss`, `entropy`, `weight` and what is read of a
    reference (`reference_loss`, `reference_entropy`), each `[B, S, H]`; with a critic, `value [B, S]`. The weights are those
    that an update after `step` would use, in the scopes of this batch; entries behind the mask mean nothing."""
    statistics, shared = _statistics_and_states(model, batch, chunk_size=objective.chunk_size)
    known = reference_entries(reference, batch, objective)
    entries = {"loss": statistics.loss, "entropy": statistics.entropy, **known}
    values = None
    if objective.critic:
        values = entries["value"] = token_values(model, shared)
    entries["weight"] = batch_weights(objective, statistics, batch, known, values, step)
    return entries


def initial_state(parameters: Parameters, optimizer: Optimizer, trainable: Trainable = ALL) -> TrainState:
    """The state before the first update; the optimizer keeps nothing of what is not trained."""
    state = optimizer.init(trainable.trained(parameters))
    return TrainState(0, torch.zeros_like(state.count), parameters, state)
