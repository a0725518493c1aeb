"""One update: statistics -> weights -> loss -> gradients -> parameters; the mirror of `wmtp_jax.train_step`.

Every algorithm takes the same path and differs in one call, `token_weights`. Nothing here waits for the device: what is not
finite is left out by arithmetic, and numbers are read by whoever logs them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from wmtp_jax import algorithms
from wmtp_jax import critic as critics
from wmtp_jax.records import StepMetrics, ValueMetrics, WeightedLoss, step_metrics
from wmtp_jax.settings import Critic, Weighting
from wmtp_jax.trainable import ALL, Trainable
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
        # What is said of token x[t] is made at t - 1.
        return torch.nn.functional.pad(torch.where(batch["positions"][:, 1:] > 0, entries[:, :-1, 0], 0.0), (1, 0))

    return by_token(loss), by_token(entropy)


reference_entries = functools.partial(
    algorithms.reference_entries, weighting, reference_token_statistics, torch.no_grad()(head_statistics)
)


# ---- weights -------------------------------------------------------------------------------------------------------


token_weights = functools.partial(algorithms.token_weights, torch, weighting)
token_score = functools.partial(critics.token_score, weighting)
value_loss = functools.partial(critics.value_loss, torch, weighting, torch.Tensor.detach)
value_sums = functools.partial(critics.value_sums, torch, weighting)


@torch.no_grad()
def _batch_weights(
    settings: Weighting, critic: Critic | None, step: int, seed: int,
    statistics: TokenStatistics, batch: Batch, reference: dict[str, Array], values: Array | None,
) -> Array:  # fmt: skip
    mask, score = batch["mask"], None
    if step < settings.start_step:
        return weighting.uniform(mask)
    if settings.needs_values:
        score = token_score(values, batch["rewards"], batch["segment_ids"], critic=critic)
    statistics = TokenStatistics(*(entry.detach() for entry in statistics))
    weights = token_weights(settings, statistics, mask, token_score=score, **reference)
    if settings.permute:
        # A function of (seed, step), as in JAX, but not the same numbers: the generators differ.
        generator = torch.Generator().manual_seed(seed << 32 | step)
        noise = torch.rand(mask.shape, generator=generator).to(mask.device, non_blocking=True)
        weights = weighting.permute(weights, mask, noise)
    return weights


# ---- loss and gradients --------------------------------------------------------------------------------------------


def loss_and_gradients(
    model: Model, batch: Batch, *, settings: Weighting, critic: Critic | None = None, reference: Model | None = None,
    step: int = 0, seed: int = 0, accumulation: int = 1, chunk_size: int | None = None, trainable: Trainable = ALL,
) -> WeightedLoss:  # fmt: skip
    """The weighted loss of a batch and its gradient in the model's parameters that require one.

    With `accumulation` A > 1 the rows go through in A parts; loss and gradient are those of the whole batch up to
    rounding. Weights of batch or head scope then cost one more forward pass, which collects the statistics first.

    Args:
      model: with its parameters.
      batch: see `Batch`; B a multiple of `accumulation`.
      settings: which weights.
      critic: how the model's value head learns beside the heads, and what its values say; None: there is none.
      reference: the reference model, where the algorithm needs one and the batch holds no stored losses.
      step: completed updates.
      seed: of the random permutation (`settings.permute`).
      accumulation: parts.
      chunk_size: tokens whose logits are held at once; None leaves it to the loss.
      trainable: what of them the gradient is in.
    """
    # With padding, heads and parts have different numbers of valid entries: one global denominator keeps the mean a mean.
    denominator = batch["mask"].sum().float()
    value_denominator = batch["rewarded"].sum().float() if critic else None

    weigh = functools.partial(_batch_weights, settings, critic, step, seed)

    reference_of = functools.partial(reference_entries, reference, settings=settings, chunk_size=chunk_size)

    def forward(part: Batch) -> tuple[TokenStatistics, Array | None]:
        statistics, shared = _statistics_and_states(model, part, chunk_size=chunk_size)
        return statistics, token_values(model, shared, train_trunk=critic.train_trunk) if critic else None

    batches, given = _parts(batch, accumulation), [None] * accumulation
    if accumulation > 1 and not settings.is_local:
        with torch.no_grad():
            collected = [(*forward(part), reference_of(part)) for part in batches]
        statistics, values, references = zip(*collected, strict=True)
        statistics = TokenStatistics(*map(_whole, zip(*statistics, strict=True)))
        of_reference = {name: _whole([part[name] for part in references]) for name in references[0]}
        weights = weigh(statistics, batch, of_reference, None if values[0] is None else _whole(values))
        given = [part["weights"] for part in _parts({"weights": weights}, accumulation)]

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = of_values = torch.zeros_like(denominator)
    gradients, entries = {}, []
    for part, part_weights in zip(batches, given, strict=True):
        statistics, values = forward(part)
        weights = weigh(statistics, part, reference_of(part), values) if part_weights is None else part_weights
        part_loss = total = weighted_mean(statistics.loss, weights, part["mask"], denominator=denominator)
        if critic:
            part_value_loss = _part_value_loss(values, part, critic, value_denominator)
            total = part_loss + critic.coefficient * part_value_loss
            of_values = of_values + part_value_loss.detach()
        loss = loss + part_loss.detach()
        _add(gradients, parameters, total)
        entries.append((statistics.loss.detach(), weights))
    losses, weights = (_whole(parts) for parts in zip(*entries, strict=True))
    return WeightedLoss(loss, of_values, trainable.trained(gradients), losses, weights)


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
    state: TrainState, batch: Batch, *, model: Model, optimizer: Optimizer, trainable: Trainable = ALL, **settings: Any
) -> tuple[TrainState, StepMetrics]:
    """One update of the parameters that are trained. Where loss or gradient is not finite, parameters and optimizer stay as
    they were and `finite` is False.

    `state.parameters` are those of `model`, changed in place; `settings` are those of `loss_and_gradients` besides `step`.
    """
    done = loss_and_gradients(model, batch, step=state.step, trainable=trainable, **settings)
    # Of the model alone: a figure that means the same for every algorithm. Before the update, which clips in place.
    norm = global_norm([g for name, g in done.gradients.items() if not name.startswith("value_head.")])
    state, finite = _apply(state, done.loss + done.value_loss, done.gradients, optimizer, trainable)
    return state, step_metrics(torch, weighting, done, batch["mask"], grad_norm=norm, finite=finite)


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
    model: Model, batch: Batch, step: int, *, settings: Weighting, critic: Critic | None = None,
    reference: Model | None = None, seed: int = 0, chunk_size: int | None = None,
) -> dict[str, Array]:  # fmt: skip
    """What the weights of a batch are made of, for the token map: `loss`, `entropy`, `weight` and what is read of a
    reference (`reference_loss`, `reference_entropy`), each `[B, S, H]`; with a critic, `value [B, S]`. The weights are those
    that an update after `step` would use, in the scopes of this batch; entries behind the mask mean nothing."""
    statistics, shared = _statistics_and_states(model, batch, chunk_size=chunk_size)
    known = reference_entries(reference, batch, settings=settings, chunk_size=chunk_size)
    entries = {"loss": statistics.loss, "entropy": statistics.entropy, **known}
    if critic:
        entries["value"] = token_values(model, shared)
    values = entries.get("value")
    entries["weight"] = _batch_weights(settings, critic, step, seed, statistics, batch, known, values)
    return entries


def initial_state(parameters: Parameters, optimizer: Optimizer, trainable: Trainable = ALL) -> TrainState:
    """The state before the first update; the optimizer keeps nothing of what is not trained."""
    state = optimizer.init(trainable.trained(parameters))
    return TrainState(0, torch.zeros_like(state.count), parameters, state)
