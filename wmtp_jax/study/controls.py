"""What a study adds to its arms: permuted twins, the baseline at equal compute, and pairs of short runs at strength 0."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from wmtp_jax.study import configuration
from wmtp_jax.study.costs import PARTS_OF_A_LEVEL, Cost, Rows, level, run_costs
from wmtp_jax.study.declaration import Arm, Declared

PERMUTED, COMPUTE = "+permuted", "+compute"
STRENGTH = "weighting.strength"
CHECK_UPDATES = 20
CHECK_TOLERANCE = 1e-6  # relative, of losses
# What a run's weights are made of, so that two runs of strength 0 may differ in it.
_WEIGHTS = ("weighting.", "reference.", "reward.", "critic.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """All arms of a study, with what they cost.

    Attributes:
      arms: by name, declared ones first, each followed by its twin, then the compute baselines.
      costs: of one run of every arm.
      compute: declared arm -> the compute baseline that it is compared with; none where it costs no more than its baseline.
    """

    arms: dict[str, Arm]
    costs: dict[str, Cost]
    compute: dict[str, str]


def plan(declared: Declared, rows: Mapping[str, Rows]) -> Plan:
    """The arms that a study is run with.

    Args:
      rows: of the corpus of every declared arm and shared run, by name.
    """
    arms: dict[str, Arm] = {}
    for name, arm in declared.arms.items():
        arms[name] = arm
        if declared.study.controls and configuration.is_weighted(declared.configs[name]):
            twin = {**arm.overrides, "weighting.permute": True}
            arms[name + PERMUTED] = Arm(name + PERMUTED, twin, arm.baseline, control_of=name, kind="permuted")
    costs = run_costs(declared, rows, {name: arm.control_of or name for name, arm in arms.items()})
    if not declared.study.controls:
        return Plan(arms, costs, {})
    levels: dict[str, dict[int, list[str]]] = {}
    for name, arm in declared.arms.items():
        parts = level(costs[name].total, costs[arm.baseline].total)
        if parts > PARTS_OF_A_LEVEL:
            levels.setdefault(arm.baseline, {}).setdefault(parts, []).append(name)
    compute = {}
    for baseline, found in levels.items():
        for parts in sorted(found):
            times = parts / PARTS_OF_A_LEVEL
            # One level needs no number in its name.
            added = f"{baseline}{COMPUTE}" + (f"{times:.2f}" if len(found) > 1 else "")
            overrides, cost = _raised(declared, baseline, costs[baseline], times, rows[baseline])
            arms[added] = Arm(added, overrides, baseline, control_of=baseline, kind="compute", level=times)
            costs[added] = cost
            compute |= dict.fromkeys(found[parts], added)
    return Plan(arms, costs, compute)


def _raised(declared: Declared, baseline: str, cost: Cost, times: float, rows: Rows) -> tuple[dict[str, Any], Cost]:
    """The baseline with more steps and its schedule stretched with them, so that a run costs `times` as much: overrides and cost.
    What it shares is not made longer, so its own updates are made so many more."""
    config = declared.configs[baseline]
    own = sum(cost.own.values())
    factor = 1 + (times - 1) * cost.total / own
    overrides = dict(declared.arms[baseline].overrides)
    if config.train.steps:
        overrides["train.steps"] = math.ceil(config.train.steps * factor - 1e-9)
        made = overrides["train.steps"] / config.train.steps
    else:
        overrides["train.epochs"] = config.train.epochs * factor
        made = factor
    overrides["optimizer.warmup_steps"] = round(config.optimizer.warmup_steps * made)
    more = {part: operations * made for part, operations in cost.own.items()}
    return overrides, Cost(more, cost.shared, cost.full + sum(more.values()) - own)


@dataclasses.dataclass(frozen=True)
class Check:
    """Two short runs that must be one: an arm at strength 0, and the same without weights.

    Attributes:
      arm: that is checked.
      at_zero, unweighted: overrides of the two runs.
    """

    arm: str
    at_zero: dict[str, Any]
    unweighted: dict[str, Any]


def strength_checks(declared: Declared) -> list[Check]:
    """A check for every weighted arm, where the configuration has a strength."""
    if not declared.study.controls or STRENGTH not in configuration.known_keys():
        return []
    short = {
        "train.steps": CHECK_UPDATES, "train.epochs": 0.0, "train.log_every": 1, "eval.every": 0, "eval.batches": 1,
        "eval.token_rows": 0, "eval.bigram": False, "eval.completions": 0, "checkpoint.every": 0, "eval.stop_metric": "",
    }  # fmt: skip
    found = []
    for name, arm in declared.arms.items():
        if not configuration.is_weighted(declared.configs[name]):
            continue
        # An arm may also differ in its heads, for example: both runs do then.
        model = {key: value for key, value in arm.overrides.items() if not key.startswith(_WEIGHTS)}
        unweighted = {**declared.arms[arm.baseline].overrides, **model, **short}
        found.append(Check(name, {**arm.overrides, STRENGTH: 0.0, **short}, unweighted))
    return found


def largest_difference(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> float:
    """The largest relative difference of any training loss that two runs have logged at the same step; infinite where one has
    logged what the other has not."""
    tables = [{row["step"]: row for row in rows if "train/loss" in row} for rows in (one, other)]
    if tables[0].keys() != tables[1].keys() or not tables[0]:
        return math.inf
    largest = 0.0
    for step, row in tables[0].items():
        for name in row:
            if name == "train/loss" or name.startswith("train/ce_head_"):
                mine, theirs = row[name], tables[1][step][name]
                largest = max(largest, abs(mine - theirs) / max(abs(theirs), 1e-30))
    return largest
