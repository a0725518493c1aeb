"""`--dry_run`: what a run would do and need."""

from __future__ import annotations

import math

import jax

from wmtp_jax.optimizer import make_optimizer
from wmtp_jax.parallel.placement import Placement
from wmtp_jax.planning.abstract_update import abstract_reference, bytes_on_a_device, lower_update
from wmtp_jax.run import summary
from wmtp_jax.run.stage import Stage
from wmtp_jax.run.stage_ends import plan_rows


def print_plan(stage: Stage, device: Placement) -> None:
    """What a run would do and need; compiles the real update without making its arrays."""
    config, settings = stage.config, stage.model
    # One that scores rewards is gone before the update.
    in_step = config.weighting.needs_reference and not stage.has_losses
    own = config.reference.model.resolve(settings.vocabulary_size, config.data.sequence_length)
    update = lower_update(
        settings,
        stage.objective,
        make_optimizer(config.optimizer, stage.steps, value_learning_rate=config.critic.learning_rate),
        rows=config.train.batch_size,
        length=config.data.sequence_length,
        mesh=device.mesh,
        reference=abstract_reference(config.reference.path, own) if in_step else None,
        stored_losses=stage.has_losses,
    )
    temporary = update.lowered.compile().memory_analysis().temp_size_in_bytes  # pyrefly: ignore[missing-attribute]  # where it compiles, it tells

    def size(tree: object) -> str:
        return summary.human_bytes(bytes_on_a_device(tree))

    rows = [
        *plan_rows(stage, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(update.state.parameters))),
        ("memory", ("" if device.mesh is None else "a device: ") +
                   f"{size(update.state.parameters)} parameters, {size(update.state.optimizer_state)} optimizer, "
                   f"{summary.human_bytes(temporary)} gradients and temporaries (compiled)"
                   + (f", {size(update.reference)} reference" if update.reference else "")),
        ("device", f"{device} ({device.device.platform})"),
    ]  # fmt: skip
    print(summary.facts("plan (--dry_run: nothing is trained)", rows))
