"""One update: statistics -> weights -> loss -> gradients -> parameters. Pure functions of arrays and frozen settings.

Every algorithm takes the same path and differs in one call, `token_weights`; so clipping, accumulation, numerics and the
treatment of non-finite values cannot differ between them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from wmtp_jax import weighting
from wmtp_jax.losses import TokenStatistics, token_statistics, weighted_mean
from wmtp_jax.model import Model

Array = jax.Array
Parameters = dict[str, Any]
# tokens, segment_ids, positions [B, S]; targets, mask [B, S, H]; where they were scored beforehand, reference_loss [B, S]:
# entry t is -log P(x[t] | x[<t]), 0 at a segment's first token. See data/.
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Weighting:
    """The section `weighting` of the configuration, in the same words, and how a reference is aligned."""

    algorithm: str = "baseline-mtp"
    form: str = "default"
    scope: str = "head"
    fraction: float = 0.7
    temperature: float = 1.0
    low: float = 0.1
    high: float = 3.0
    softmax_temperature: float = 0.7
    signed: bool = True
    threshold: float = 0.0
    gamma: float = 2.0
    decay: float = 0.8
    members: tuple[str, ...] = ()
    coefficients: tuple[float, ...] = ()
    permute: bool = False
    start_step: int = 0
    alignment: str = "next_token"


class Reference(NamedTuple):
    """A frozen model that tells how hard a token is: its structure (static) and its parameters."""

    definition: nnx.GraphDef
    parameters: Parameters


class TrainState(NamedTuple):
    """All that an update changes. `step` counts completed updates, `skipped` those left out as non-finite (int32)."""

    step: Array
    skipped: Array
    parameters: Parameters
    optimizer_state: Any


def merge(definition: nnx.GraphDef, parameters: Parameters) -> Model:
    """The model with these parameters; cheap, made inside the traced functions."""
    return nnx.merge(definition, nnx.State(parameters))


def split(model: Model) -> tuple[nnx.GraphDef, Parameters]:
    """A model as its structure and a nested dict of arrays."""
    definition, state = nnx.split(model)
    return definition, nnx.to_pure_dict(state)


# ---- statistics ----------------------------------------------------------------------------------------------------


def head_statistics(model: Model, batch: Batch, *, chunk_size: int | None = None) -> TokenStatistics:
    """Loss, entropy and Σp² of every (position, head), each `[B, S, H]` float32; H from `batch["targets"]`.

    The loss is differentiable in the model's parameters, the others are not. Entries behind the mask are finite and mean
    nothing.
    """
    context = model.context(batch["segment_ids"], batch["positions"])
    shared = model.trunk(batch["tokens"], batch["positions"], context)
    targets = batch["targets"]
    groups, start = [], 0
    for states, unembedding in model.head_groups(shared, batch["tokens"], context, num_heads=targets.shape[-1]):
        stop = start + (unembedding.shape[0] if unembedding.ndim == 3 else states.shape[-2])
        narrow = unembedding.astype(states.dtype)
        groups.append(token_statistics(states, narrow, targets[..., start:stop], chunk_size=chunk_size))
        start = stop
    return TokenStatistics(*(jnp.concatenate(parts, axis=-1) for parts in zip(*groups, strict=True)))


def reference_loss(reference: Reference, batch: Batch, *, alignment: str, chunk_size: int | None = None) -> Array:
    """The reference's loss on every (position, head)'s target, `[B, S, H]`, without gradient.

    `next_token`: of target x[s+1+k] given its own prefix x[<= s+k]; `same_prefix`: given x[<= s], from the reference's
    own head k.
    """
    model = merge(reference.definition, jax.lax.stop_gradient(reference.parameters))
    num_heads = batch["targets"].shape[-1]
    if alignment == "same_prefix":
        return jax.lax.stop_gradient(head_statistics(model, batch, chunk_size=chunk_size).loss)
    next_token = {**batch, "targets": batch["targets"][..., :1]}
    loss = head_statistics(model, next_token, chunk_size=chunk_size).loss[..., 0]
    # Entry t is about token x[t]: the loss made at t - 1, and 0 where x[t] begins a segment.
    by_token = jnp.where(batch["positions"][:, 1:] > 0, loss[:, :-1], 0.0)
    by_token = jnp.pad(by_token, ((0, 0), (1, 0)))
    return jax.lax.stop_gradient(weighting.align_to_heads(by_token, num_heads=num_heads))


# ---- weights -------------------------------------------------------------------------------------------------------


def needs_reference(settings: Weighting) -> bool:
    """Whether the weights depend on a reference model's losses."""
    return settings.algorithm in ("rho1-weighted", "rho1-tokenskip")


def is_local(settings: Weighting) -> bool:
    """Whether a row's weights depend on that row alone, so that micro-batches can be weighted one by one."""
    if settings.permute:
        return False
    if settings.algorithm == "baseline-mtp" or settings.form == "softmax_over_heads":
        return True
    return settings.scope in ("position", "sequence")


def _weights_from_score(score: Array, mask: Array, settings: Weighting, *, default: str) -> Array:
    form = default if settings.form == "default" else settings.form
    match form:
        case "exponential":
            return weighting.exponential(
                score,
                mask,
                temperature=settings.temperature,
                low=settings.low,
                high=settings.high,
                scope=settings.scope,
            )
        case "top_fraction":
            return weighting.top_fraction(score, mask, fraction=settings.fraction, scope=settings.scope)
        case "softmax_over_heads":
            return weighting.softmax_over_heads(score, mask, temperature=settings.softmax_temperature)
    raise ValueError(f"form {form!r}: must be exponential, top_fraction or softmax_over_heads")


def token_weights(
    settings: Weighting, statistics: TokenStatistics, mask: Array, *, reference_loss: Array | None = None
) -> Array:
    """What every (position, head) term of the loss is worth, `[B, S, H]`: masked mean 1 in its scope, no gradient."""
    loss = statistics.loss
    match settings.algorithm:
        case "baseline-mtp":
            return weighting.uniform(mask)
        case "rho1-weighted" | "rho1-tokenskip":
            score = weighting.excess_loss(loss, reference_loss, signed=settings.signed, threshold=settings.threshold)
            default = "exponential" if settings.algorithm == "rho1-weighted" else "top_fraction"
            return _weights_from_score(score, mask, settings, default=default)
        case "gradient":
            score = weighting.logit_gradient_norm(jnp.exp(-loss), statistics.squared_probability_sum)
            return _weights_from_score(score, mask, settings, default="exponential")
        case "confidence":
            return weighting.confidence(loss, mask, scope=settings.scope)
        case "focal":
            return weighting.focal(loss, mask, gamma=settings.gamma, scope=settings.scope)
        case "entropy":
            return weighting.entropy(statistics.entropy, mask, scope=settings.scope)
        case "head-decay":
            # Within one head it would be uniform, so the widest scope that holds several heads stands for `head`.
            scope = "batch" if settings.scope == "head" else settings.scope
            return weighting.head_decay(mask, decay=settings.decay, scope=scope)
        case "hybrid":
            members = [
                token_weights(dataclasses.replace(settings, algorithm=member), statistics, mask)
                for member in settings.members
            ]
            # As above: mean one in every head would undo a member that moves weight between heads.
            scope = "batch" if settings.scope == "head" and "head-decay" in settings.members else settings.scope
            return weighting.combine(jnp.stack(members), mask, coefficients=settings.coefficients, scope=scope)
    raise ValueError(f"algorithm {settings.algorithm!r}: has no weights here")


def _batch_weights(
    settings: Weighting,
    statistics: TokenStatistics,
    batch: Batch,
    step: Array,
    seed: int,
    reference_loss: Array | None,
) -> Array:
    mask = batch["mask"]
    weights = token_weights(settings, statistics, mask, reference_loss=reference_loss)
    if settings.permute:
        noise = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step), mask.shape)
        weights = weighting.permute(weights, mask, noise)
    if settings.start_step:
        weights = jnp.where(step < settings.start_step, weighting.uniform(mask), weights)
    return jax.lax.stop_gradient(weights)


# ---- the update ----------------------------------------------------------------------------------------------------


class StepMetrics(NamedTuple):
    """Scalars of one update (float32; `ce_head [H]`), `finite` a bool: whether the update was made."""

    loss: Array
    ce_head: Array
    weight_entropy: Array
    effective_sample_fraction: Array
    grad_norm: Array
    finite: Array


def masked_head_means(loss: Array, mask: Array) -> Array:
    """Unweighted mean of `loss [..., S, H]` over the valid entries of every head, `[H]`; 0 for a head without any."""
    axes = tuple(range(mask.ndim - 1))
    counts = mask.sum(axis=axes).astype(loss.dtype)
    return jnp.where(mask, loss, 0.0).sum(axis=axes) / jnp.maximum(counts, 1.0)


def loss_and_gradients(
    parameters: Parameters,
    batch: Batch,
    *,
    definition: nnx.GraphDef,
    settings: Weighting,
    reference: Reference | None = None,
    step: Array | int = 0,
    seed: int = 0,
    accumulation: int = 1,
    chunk_size: int | None = None,
) -> tuple[Array, Parameters, Array, Array]:
    """The weighted loss of a batch, its gradient, and the losses and weights that went into it.

    With `accumulation` A > 1 the rows go through in A parts; loss and gradient are those of the whole batch up to
    rounding. Weights of batch or head scope then cost one more forward pass, which collects the statistics first.

    Args:
      parameters: of the model.
      batch: see `Batch`; B a multiple of `accumulation`.
      definition: the model's structure.
      settings: which weights.
      reference: the reference model, where the algorithm needs one and the batch holds no stored losses.
      step: completed updates.
      seed: of the random permutation (`settings.permute`).
      accumulation: parts.
      chunk_size: tokens whose logits are held at once; None leaves it to the loss.

    Returns:
      loss (scalar), gradients (a tree like `parameters`), per-entry losses and weights (each `[B, S, H]`).
    """
    # With padding, heads and parts have different numbers of valid entries: one global denominator keeps the mean a mean.
    denominator = batch["mask"].sum().astype(jnp.float32)

    def weigh(statistics: TokenStatistics, part: Batch, part_reference: Array | None) -> Array:
        return _batch_weights(settings, statistics, part, step, seed, part_reference)

    def reference_of(part: Batch) -> Array | None:
        if not needs_reference(settings):
            return None
        if "reference_loss" in part:
            return weighting.align_to_heads(part["reference_loss"], num_heads=part["mask"].shape[-1])
        return reference_loss(reference, part, alignment=settings.alignment, chunk_size=chunk_size)

    def objective(parameters: Parameters, part: Batch, given: Array | None) -> tuple[Array, tuple[Array, Array]]:
        statistics = head_statistics(merge(definition, parameters), part, chunk_size=chunk_size)
        weights = weigh(statistics, part, reference_of(part)) if given is None else given
        loss = weighted_mean(statistics.loss, weights, part["mask"], denominator=denominator)
        return loss, (jax.lax.stop_gradient(statistics.loss), weights)

    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    if accumulation == 1:
        (loss, (losses, weights)), gradients = value_and_grad(parameters, batch, None)
        return loss, gradients, losses, weights

    # Row r goes to part r % A: rows that lie on one device stay there when the batch is sharded.
    def parts(x: Array) -> Array:
        return x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)

    def whole(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    batches = jax.tree.map(parts, batch)
    given = None
    if not is_local(settings):

        def collect(_: None, part: Batch) -> tuple[None, tuple[TokenStatistics, Array | None]]:
            statistics = head_statistics(merge(definition, parameters), part, chunk_size=chunk_size)
            return None, (jax.lax.stop_gradient(statistics), reference_of(part))

        _, collected = jax.lax.scan(collect, None, batches)
        statistics, references = jax.tree.map(whole, collected)
        given = parts(weigh(statistics, batch, references))

    def add(carry: tuple[Array, Parameters], scanned: tuple[Batch, Array | None]) -> tuple[Any, Any]:
        part, part_weights = scanned
        (loss, entries), gradients = value_and_grad(parameters, part, part_weights)
        return (carry[0] + loss, jax.tree.map(jnp.add, carry[1], gradients)), entries

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, parameters))
    (loss, gradients), entries = jax.lax.scan(add, start, (batches, given))
    losses, weights = jax.tree.map(whole, entries)
    return loss, gradients, losses, weights


def train_step(
    state: TrainState,
    batch: Batch,
    reference_parameters: Parameters | None,
    *,
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    settings: Weighting,
    reference_definition: nnx.GraphDef | None = None,
    seed: int = 0,
    accumulation: int = 1,
    chunk_size: int | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update. Where loss or gradient is not finite, parameters and optimizer stay as they were and `finite` is False."""
    reference = None if reference_parameters is None else Reference(reference_definition, reference_parameters)
    loss, gradients, losses, weights = loss_and_gradients(
        state.parameters,
        batch,
        definition=definition,
        settings=settings,
        reference=reference,
        step=state.step,
        seed=seed,
        accumulation=accumulation,
        chunk_size=chunk_size,
    )
    grad_norm = optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.parameters)
    updated = (optax.apply_updates(state.parameters, updates), optimizer_state)
    parameters, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, (state.parameters, state.optimizer_state)
    )
    metrics = StepMetrics(
        loss=loss,
        ce_head=masked_head_means(losses, batch["mask"]),
        weight_entropy=weighting.weight_entropy(weights, batch["mask"]),
        effective_sample_fraction=weighting.effective_sample_fraction(weights, batch["mask"]),
        grad_norm=grad_norm,
        finite=finite,
    )
    skipped = state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
    return TrainState(state.step + 1, skipped, parameters, optimizer_state), metrics


def inspect_tokens(
    parameters: Parameters,
    batch: Batch,
    reference_parameters: Parameters | None,
    step: Array | int,
    *,
    definition: nnx.GraphDef,
    settings: Weighting,
    reference_definition: nnx.GraphDef | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
) -> dict[str, Array]:
    """What the weights of a batch are made of, for the token map: `loss`, `entropy`, `weight` and, where there is a
    reference, `reference_loss`, each `[B, S, H]`. The weights are those that an update after `step` would use, in the
    scopes of this batch; entries behind the mask mean nothing."""
    statistics = head_statistics(merge(definition, parameters), batch, chunk_size=chunk_size)
    entries = {"loss": statistics.loss, "entropy": statistics.entropy}
    if reference_parameters is not None:
        reference = Reference(reference_definition, reference_parameters)
        entries["reference_loss"] = reference_loss(
            reference, batch, alignment=settings.alignment, chunk_size=chunk_size
        )
    known = entries.get("reference_loss")
    entries["weight"] = _batch_weights(settings, statistics, batch, jnp.asarray(step), seed, known)
    return entries


def initial_state(parameters: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    # Two arrays, not one twice: the update takes over the memory of each.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, skipped, parameters, optimizer.init(parameters))
