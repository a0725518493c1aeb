"""What a run costs, in operations by formula: its own updates, and its share of what was made for several runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from wmtp_jax.planning.flops import flops_per_token, trunk_flops_per_token
from wmtp_jax.settings import Configuration, ModelSettings
from wmtp_jax.study import configuration
from wmtp_jax.study.declaration import Declared, shared_run, shared_runs

# Cost levels are a whole number of these shares of the baseline.
PARTS_OF_A_LEVEL = 20  # 5%


class Rows(NamedTuple):
    """What a corpus has, as far as operations depend on it.

    Attributes:
      vocabulary_size: of its tokenizer.
      training: rows of the training side.
      all: rows of all sides, which a stored score covers.
    """

    vocabulary_size: int
    training: int
    all: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations of one run.

    Attributes:
      own: by part, what this run alone pays.
      shared: by shared run, this run's share of it.
      full: as if this run had paid for all that it shares.
    """

    own: dict[str, float]
    shared: dict[str, float]
    full: float

    @property
    def total(self) -> float:
        return sum(self.own.values()) + sum(self.shared.values())


def own_operations(config: Configuration, rows: Rows, declared: Declared) -> dict[str, float]:
    """What a run does itself, by part; parts that cost nothing are left out.

    Args:
      config: of the run.
      rows: of its corpus.
      declared: the study, whose shared runs it may start from or be weighted by.
    """
    length, train, critic = config.data.sequence_length, config.train, config.critic
    tokens_a_step = train.batch_size * length
    steps = train.total_steps(rows.training)
    model = configuration.model_of(config, rows.vocabulary_size)
    update = flops_per_token(model, length, trained=config.pretrained.trainable)
    weighting = config.weighting
    found: dict[str, float] = {}
    if config.uses_reference:
        shared = shared_run(config.reference.path)
        reference = (
            configuration.model_of(declared.shared[shared], rows.vocabulary_size)
            if shared
            else configuration.reference_model_of(config, rows.vocabulary_size)
        )
        if not config.reference.path:
            found["reference"] = config.reference.steps * tokens_a_step * flops_per_token(reference, length)
        forward = _forward(
            reference, length, one_head=weighting.needs_values or config.reference.alignment == "next_token"
        )
        if weighting.needs_values and not critic.head and critic.stop_after != "trunk":
            found["rewards"] = rows.all * length * forward
        if weighting.needs_reference and shared not in declared.study.scored:
            found["reference passes"] = steps * tokens_a_step * forward
    if weighting.needs_values:
        if not critic.trunk and critic.trunk_steps:
            found["trunk"] = critic.trunk_steps * tokens_a_step * update
        if not critic.head and critic.stop_after != "trunk":
            found["value head"] = critic.steps * tokens_a_step * trunk_flops_per_token(model, length)
        if critic.stop_after:
            return found
    found["updates"] = steps * tokens_a_step * update
    if train.accumulation > 1 and not weighting.is_local:
        found["statistics passes"] = steps * tokens_a_step * _forward(model, length)
    return found


def _forward(model: ModelSettings, length: int, *, one_head: bool = False) -> float:
    """Of a forward pass, a token: a third of the operations of an update."""
    return flops_per_token(dataclasses.replace(model, num_heads=1) if one_head else model, length) / 3


def uses(declared: Declared, name: str) -> tuple[str, ...]:
    """The shared runs that an arm's or a shared run's overrides lead to, those of shared runs included."""
    study = declared.study
    direct = shared_runs(study.arms[name] if name in study.arms else study.shared[name])
    found: dict[str, None] = {}
    for run in direct:
        found |= dict.fromkeys((*uses(declared, run), run))
    return tuple(found)


def run_costs(declared: Declared, rows: Mapping[str, Rows], origins: Mapping[str, str]) -> dict[str, Cost]:
    """The cost of one run of every arm.

    Args:
      rows: of the corpus of every arm and shared run that was declared, by name.
      origins: arm -> the declared arm whose configuration decides what it costs. All of these share the shared runs.
    """
    study = declared.study
    needed = {name: uses(declared, name) for name in (*study.arms, *study.shared)}
    whole = {}
    for run, config in declared.shared.items():
        whole[run] = sum(own_operations(config, rows[run], declared).values())
        scored_for = [arm for arm in study.arms if run in needed[arm]]
        if run in study.scored and scored_for:
            model, config = configuration.model_of(config, rows[run].vocabulary_size), declared.configs[scored_for[0]]
            length = config.data.sequence_length
            whole[run] += rows[scored_for[0]].all * length * _forward(model, length, one_head=True)
    runs = {run: len(study.seeds) * sum(run in needed[origin] for origin in origins.values()) for run in study.shared}
    found = {}
    for arm, origin in origins.items():
        own = own_operations(declared.configs[origin], rows[origin], declared)
        share = {run: whole[run] / runs[run] for run in needed[origin]}
        found[arm] = Cost(own, share, sum(own.values()) + sum(whole[run] for run in needed[origin]))
    return found


def level(cost: float, baseline: float) -> int:
    """How many `PARTS_OF_A_LEVEL`th parts of the baseline's cost this is, rounded up."""
    return math.ceil(cost / baseline * PARTS_OF_A_LEVEL - 1e-9)
