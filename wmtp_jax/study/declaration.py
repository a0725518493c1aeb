"""What a study asks, and of what: arms x seeds of one recipe at one size, and the difference that would matter.

A declaration is a Python file, `configs/studies/NAME.py`, whose `get_study()` returns a `Study`. It is committed before the runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wmtp_jax.errors import UserError
from wmtp_jax.settings import Configuration
from wmtp_jax.study import configuration

BACKENDS = ("jax", "torch")
# Of an override's value that is a shared run: shared:NAME, or a directory below it, shared:NAME/value.
SHARED = "shared:"
# A name becomes a directory, a flag's value and a cell of a table; the signs are for arms that the study adds.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What a try may change: what costs nothing, so that equal compute does not depend on which try is chosen.
_TRIED = ("optimizer.", "weighting.")
TEST, EVALUATIONS = "test", "evaluations"

Overrides = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
    """One size of one question.

    Attributes:
      question: one sentence.
      prediction: the answer that is expected before the runs.
      recipe: `configs/NAME.py[:TARGET]`.
      arms: name -> overrides of the recipe, by dotted key without `config.`. A value `shared:NAME` stands for the directory of a
        shared run.
      seeds: values of `train.seed`, each run by every arm.
      difference: d, the smallest difference of the metric that would matter.
      baseline: the arm that the others are compared with.
      baselines: arm -> another arm that it is compared with instead, for those that start from a trained model.
      metric: that the verdict reads, without the prefix of its split.
      lower_is_better: which way of the metric is better.
      over: test: the metric on the test split, or on validation where the recipe has no test split, after the last update;
        evaluations: the mean over all evaluations while training.
      beside: further metrics that the table shows.
      common: overrides of every run, the shared ones included: the size.
      shared: name -> overrides of a run that is made once, before the others; a later one may start from an earlier one.
      scored: shared runs whose losses on the arms' rows are stored before the arms run, so that no arm computes them.
      controls: add the permuted twin of every weighted arm, the baseline at the compute of every cost level, and the check that
        strength 0 is the baseline.
      tries: overrides of which every arm gets the best on validation; none: the arms are as they are.
      try_seeds: seeds of the tries, none of them one of `seeds`.
      backend: jax or torch.
    """

    question: str
    recipe: str
    arms: Mapping[str, Overrides]
    seeds: tuple[int, ...]
    difference: float
    prediction: str = ""
    baseline: str = "baseline"
    baselines: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metric: str = "bits_per_byte"
    lower_is_better: bool = True
    over: str = TEST
    beside: tuple[str, ...] = ()
    common: Overrides = dataclasses.field(default_factory=dict)
    shared: Mapping[str, Overrides] = dataclasses.field(default_factory=dict)
    scored: tuple[str, ...] = ()
    controls: bool = True
    tries: tuple[Overrides, ...] = ()
    try_seeds: tuple[int, ...] = ()
    backend: str = "jax"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One column of runs, declared or added.

    Attributes:
      name: of the arm.
      overrides: of the recipe, the study's common ones included.
      baseline: the arm that it is compared with; its own name for a baseline.
      control_of: the arm that this is a control of; None for those that were declared.
      kind: declared, permuted or compute.
      level: of compute, as a multiple of the baseline's; 1 but for `compute`.
    """

    name: str
    overrides: dict[str, Any]
    baseline: str
    control_of: str | None = None
    kind: str = "declared"
    level: float = 1.0

    @property
    def is_baseline(self) -> bool:
        return self.baseline == self.name


def load_study(path: str) -> tuple[str, Study]:
    """The study of a file and its name, the file's.

    Raises:
      UserError: no such file, no `get_study` in it, or fields that no study has.
    """
    module = configuration.load_module(path, flag="--config")
    if not hasattr(module, "get_study"):
        raise UserError(f"--config={path}: has no get_study(); a study is a file such as configs/studies/toy.py")
    try:
        study = module.get_study()
    except TypeError as error:
        raise UserError(f"--config={path}: {error}") from error
    if not isinstance(study, Study):
        raise UserError(f"--config={path}: get_study() returns {type(study).__name__}, not a Study")
    return Path(path).stem, study


@dataclasses.dataclass(frozen=True)
class Declared:
    """A study that was checked, and the configurations of its runs.

    Attributes:
      name: of the study.
      study: as it was declared.
      arms: by name, the declared ones.
      recipe: the tree that all start from.
      configs: of every arm, by name.
      shared: configurations of the shared runs, by name.
    """

    name: str
    study: Study
    arms: dict[str, Arm]
    recipe: ConfigDict
    configs: dict[str, Configuration]
    shared: dict[str, Configuration]


def check_study(name: str, study: Study) -> Declared:
    """Everything about a study that can be known before its runs.

    Raises:
      UserError: one line that names the field, arm or key, and what it must be.
    """
    _check_fields(study)
    recipe = configuration.read_recipe(study.recipe)
    shared = {}
    for run, overrides in study.shared.items():
        shared[run] = _config(recipe, study, overrides, owner=f"shared.{run}", known=tuple(shared))
    arms, configs = {}, {}
    for arm, overrides in study.arms.items():
        baseline = (
            arm if arm in (study.baseline, *study.baselines.values()) else study.baselines.get(arm, study.baseline)
        )
        arms[arm] = Arm(arm, {**study.common, **overrides}, baseline)
        configs[arm] = _config(recipe, study, overrides, owner=f"arms.{arm}", known=tuple(shared))
    for overrides in study.tries:
        for key in overrides:
            if not key.startswith(_TRIED):
                raise UserError(
                    f"tries: config.{key}: a try may change keys of optimizer and weighting, which cost nothing"
                )
        for arm in arms:
            _config(recipe, study, {**study.arms[arm], **overrides}, owner=f"tries of arms.{arm}", known=tuple(shared))
    _check_distinct(configs)
    _check_starts(arms, configs)
    _check_metrics(study, configs)
    return Declared(name, study, arms, recipe, configs, shared)


def shared_runs(overrides: Overrides) -> list[str]:
    """Names of the shared runs that these overrides use."""
    return list(dict.fromkeys(run for value in overrides.values() if (run := shared_run(value))))


def shared_run(value: Any) -> str:
    """`shared:NAME/value -> NAME`; "" for a value that is no shared run's."""
    is_one = isinstance(value, str) and value.startswith(SHARED)
    return value.removeprefix(SHARED).partition("/")[0] if is_one else ""


def _config(
    recipe: ConfigDict, study: Study, overrides: Overrides, *, owner: str, known: tuple[str, ...]
) -> Configuration:  # fmt: skip
    if "train.seed" in overrides or "train.seed" in study.common:
        raise UserError(f"{owner}: config.train.seed: the study's seeds set it")
    for run in shared_runs(overrides):
        if run not in known:
            raise UserError(f"{owner}: {SHARED}{run}: no shared run of that name before it; declare it in shared")
    return configuration.with_overrides(recipe, {**study.common, **overrides}, owner=owner)


def _check_fields(study: Study) -> None:
    for field in ("arms", "shared", "common", "baselines"):
        if not isinstance(getattr(study, field), Mapping):
            raise UserError(f"{field} = {getattr(study, field)!r}: must be a dict")
    for key, value in study.common.items():
        if shared_run(value):
            raise UserError(
                f"common: config.{key} = {value!r}: arms and shared runs name the shared runs that they use"
            )
    if not study.question.strip():
        raise UserError("question: must be a sentence; it is what the verdict answers")
    for name in (*study.arms, *study.shared):
        if not _NAME.fullmatch(name):
            raise UserError(f"arms: {name!r}: must be a name of letters, digits, dots, dashes and underscores")
    if len(study.arms) < 2:
        raise UserError(f"arms = {list(study.arms)}: must be at least 2, the baseline among them")
    for field, name in (("baseline", study.baseline), *(("baselines", name) for name in study.baselines.values())):
        if name not in study.arms:
            raise UserError(f"{field} = {name!r}: must be one of the arms, " + ", ".join(study.arms))
    for name in study.baselines:
        if name not in study.arms:
            raise UserError(f"baselines: {name!r}: must be one of the arms, " + ", ".join(study.arms))
    for name in study.scored:
        if name not in study.shared:
            raise UserError(f"scored: {name!r}: must be a shared run")
    _check_seeds("seeds", study.seeds, least=2)
    if bool(study.tries) != bool(study.try_seeds):
        raise UserError("tries and try_seeds: a choice needs both, settings and seeds of its own")
    if study.tries:
        _check_seeds("try_seeds", study.try_seeds, least=1)
        if len(study.tries) < 2:
            raise UserError("tries: must be at least 2 settings; one is no choice")
        if common := sorted(set(study.seeds) & set(study.try_seeds)):
            raise UserError(
                f"try_seeds: {common[0]} is one of seeds, too; what chooses a setting does not also judge it"
            )
    if not isinstance(study.difference, (int, float)) or not 0 < study.difference < float("inf"):
        raise UserError(f"difference = {study.difference!r}: must be a number above 0, in units of {study.metric}")
    if study.backend not in BACKENDS:
        raise UserError(f"backend = {study.backend!r}: must be one of " + ", ".join(BACKENDS))
    if study.over not in (TEST, EVALUATIONS):
        raise UserError(f"over = {study.over!r}: must be {TEST} or {EVALUATIONS}")


def _check_seeds(field: str, seeds: tuple[int, ...], *, least: int) -> None:
    if not isinstance(seeds, tuple) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{field} = {seeds!r}: must be a tuple of whole numbers, 0 or more")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{field} = {seeds!r}: names a seed twice")
    if len(seeds) < least:
        what = "; differences of one pair have no spread" if least == 2 else ""
        raise UserError(f"{field} = {seeds!r}: must be at least {least}{what}")


def _check_distinct(configs: Mapping[str, Configuration]) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    for name, config in configs.items():
        keys = configuration.decisive(config)
        for other, known in seen:
            if keys == known:
                raise UserError(
                    f"arms.{name}: the same configuration as arms.{other}; change a key that counts, or leave it out"
                )
        seen.append((name, keys))


def _check_starts(arms: Mapping[str, Arm], configs: Mapping[str, Configuration]) -> None:
    """An arm that starts from a trained model is compared with one that starts from the same."""
    starts = {name: configuration.start_of(config) for name, config in configs.items()}
    for name, arm in arms.items():
        if starts[name] != starts[arm.baseline]:
            raise UserError(
                f"arms.{name}: starts from {starts[name]}, arms.{arm.baseline} from {starts[arm.baseline]}; declare an arm that "
                "starts from the same (pretrained.path) and name it in baselines"
            )


def _check_metrics(study: Study, configs: Mapping[str, Configuration]) -> None:
    for field, name in (("metric", study.metric), *(("beside", name) for name in study.beside)):
        for arm, config in configs.items():
            known = configuration.metric_names(config)
            if name not in known:
                raise UserError(f"{field} = {name!r}: no run of arms.{arm} writes it; one of " + ", ".join(known))
