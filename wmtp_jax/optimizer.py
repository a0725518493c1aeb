"""Learning-rate schedules and the update rule, all from optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from wmtp_jax.settings import Optimizer

# Tables and the heads' unembeddings: their rows are tokens, so Muon's orthogonal update does not suit them (Jordan et al. 2024).
TABLES = ("embedding", "position_embedding", "unembedding")


def make_schedule(settings: Optimizer, total_steps: int) -> optax.Schedule:
    """Step (0-based) -> factor in [0, 1] of the highest learning rate.

    Linear warm-up, then `cosine` to `final_fraction`, `wsd` (arXiv 2404.06395: stable, then a linear fall to
    `final_fraction` over the last `decay_fraction` of the run) or `constant`. A warm-up longer than half the run is cut
    to that, so that short tries of a recipe still reach its rate.
    """
    warmup = min(settings.warmup_steps, total_steps // 2)
    rest = max(total_steps - warmup, 1)
    match settings.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(1.0, rest, alpha=settings.final_fraction)
        case "wsd":
            decay = max(round(settings.decay_fraction * total_steps), 1)
            stable = max(rest - decay, 0)
            fall = optax.linear_schedule(1.0, settings.final_fraction, min(decay, rest))
            after = optax.join_schedules([optax.constant_schedule(1.0), fall], [stable])
        case _:  # constant; `settings.Optimizer` has refused all others
            after = optax.constant_schedule(1.0)
    if warmup == 0:
        return after
    # From 1/(warmup+1): a first step with rate 0 would be a step that learns nothing.
    rise = optax.linear_schedule(1.0 / (warmup + 1), 1.0, warmup)
    return optax.join_schedules([rise, after], [warmup])


def parameter_kinds(parameters: Any) -> Any:
    """The tree of parameters with, for every leaf, `matrix`, `table` or `vector`.

    A matrix is a kernel `[in, out]`, or a stack of them; a table maps tokens or positions; the rest are vectors.
    """

    def kind(path: tuple, leaf: Any) -> str:
        names = [str(entry.key) for entry in path]
        if names[-1] in TABLES or names == ["heads"]:
            return "table"
        return "matrix" if names[-1] == "kernel" else "vector"

    return jax.tree_util.tree_map_with_path(kind, parameters)


def make_optimizer(
    settings: Optimizer, total_steps: int, *, value_learning_rate: float = 0.0
) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon for matrices with AdamW for the rest (with Nesterov's momentum, as optax's Muon has it).

    Weight decay applies to matrices only. Parameters under `value_head` get AdamW without decay at `value_learning_rate`,
    clipped by their own norm: how a value function learns never changes a model's update.
    """

    def labels(parameters: Any) -> Any:
        name = lambda path, _: "value_head" if path[0].key == "value_head" else "model"  # noqa: E731
        return jax.tree_util.tree_map_with_path(name, parameters)

    factor = make_schedule(settings, total_steps)
    groups = {"model": _model_rule(settings, factor), "value_head": _value_rule(settings, value_learning_rate, factor)}
    clipped = {name: _clipped(rule, settings.clip_norm) for name, rule in groups.items()}
    return optax.partition(clipped, labels)


def _clipped(rule: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(norm), rule) if norm else rule


def _scaled(rate: float, factor: optax.Schedule) -> optax.Schedule:
    return lambda step: rate * factor(step)


def _value_rule(settings: Optimizer, rate: float, factor: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(_scaled(rate, factor), b1=settings.b1, b2=settings.b2, eps=settings.epsilon, weight_decay=0.0)


def _model_rule(settings: Optimizer, factor: optax.Schedule) -> optax.GradientTransformation:
    def is_matrix(parameters: Any) -> Any:
        return jax.tree.map(lambda kind: kind == "matrix", parameter_kinds(parameters))

    match settings.name:
        case "adamw":
            return optax.adamw(
                _scaled(settings.learning_rate, factor),
                b1=settings.b1,
                b2=settings.b2,
                eps=settings.epsilon,
                weight_decay=settings.weight_decay,
                mask=is_matrix,
            )
        case _:  # muon; `settings.Optimizer` has refused all others

            def dimensions(parameters: Any) -> Any:
                # The last two axes are (in, out); an axis before them stacks layers, each orthogonalised by itself.
                def of(kind: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
                    if kind != "matrix":
                        return None
                    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

                return jax.tree.map(of, parameter_kinds(parameters), parameters)

            return optax.contrib.muon(
                _scaled(settings.muon_learning_rate, factor),
                weight_decay=settings.weight_decay,
                adam_b1=settings.b1,
                adam_b2=settings.b2,
                eps=settings.epsilon,
                adam_learning_rate=_scaled(settings.learning_rate, factor),
                muon_weight_dimension_numbers=dimensions,
            )
