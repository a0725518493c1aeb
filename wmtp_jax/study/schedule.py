"""The runs of a study in order: shared ones, checks, tries, then arms seed by seed; and what is known before they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from wmtp_jax.data.corpus import Corpus
from wmtp_jax.data.pipeline import rows_per_epoch
from wmtp_jax.run.inputs import load_data
from wmtp_jax.settings import Configuration
from wmtp_jax.study import configuration, controls, jobs, provenance
from wmtp_jax.study.controls import Plan
from wmtp_jax.study.costs import Rows, own_operations, uses
from wmtp_jax.study.declaration import Declared, shared_run
from wmtp_jax.study.jobs import Job
from wmtp_jax.study.runner import Part, identity


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the parts of a study are made from.

    Attributes:
      declared: the study, checked.
      program: hash of the program.
      corpora: of every declared arm and shared run, by name.
      plan: its arms, those that it adds included, and what they cost.
    """

    declared: Declared
    program: str
    corpora: Mapping[str, Corpus]
    plan: Plan

    @property
    def record(self) -> dict[str, Any]:
        """`study.json` as far as it is known before the runs."""
        study, declared = self.declared.study, self.declared
        arms = {}
        for name, arm in self.plan.arms.items():
            origin, cost = self.origin(name), self.plan.costs[name]
            baseline = self.plan.costs[arm.baseline]
            twin = name + controls.PERMUTED
            arms[name] = {
                "seeds": list(study.seeds),
                "control_of": arm.control_of,
                "kind": arm.kind,
                "baseline": arm.baseline,
                "controls": {
                    "baseline": arm.baseline,
                    "permuted": twin if twin in self.plan.arms else None,
                    "compute": self.plan.compute.get(name),
                },
                "tries": len(study.tries) or 1,
                "overrides": _plain(
                    {key: value for key, value in arm.overrides.items() if study.common.get(key) != value}
                ),
                "corpus": self.corpora[origin].hash,
                "cost": {
                    "own": cost.own,
                    "shared": cost.shared,
                    "total": cost.total,
                    "full": cost.full,
                    "ratio": cost.total / baseline.total,
                    "full_ratio": cost.full / baseline.total,
                },
            }
        return {
            "format": 1,
            "name": declared.name,
            "question": study.question,
            "prediction": study.prediction,
            "recipe": study.recipe,
            "backend": study.backend,
            "metric": {"name": study.metric, "lower_is_better": study.lower_is_better, "over": study.over},
            "baseline": study.baseline,
            "difference_that_matters": study.difference,
            "seeds": list(study.seeds),
            "tries": [_plain(overrides) for overrides in study.tries],
            "try_seeds": list(study.try_seeds),
            "beside": list(study.beside),
            "program": self.program,
            "configuration": configuration.decisive(declared.configs[study.baseline]),
            "common": _plain(study.common),
            "shared": {name: _plain(overrides) for name, overrides in study.shared.items()},
            "arms": arms,
        }

    # ---- its runs ------------------------------------------------------------------------------------------------------

    def shared_jobs(self, arms: Iterable[str]) -> list[Job]:
        """The shared runs that these arms lead to, in the order of their declaration."""
        wanted = {run for arm in arms for run in uses(self.declared, self.origin(arm))}
        common, found = self.declared.study.common, []
        for name in self.declared.shared:
            if name in wanted:
                overrides = {**common, **self.declared.study.shared[name]}
                found.append(self._job(jobs.SHARED_RUNS, name, owner=name, arm=name, seed=None, overrides=overrides))
        return found

    def score_jobs(self, arms: Iterable[str]) -> list[Job]:
        """What stores the losses of scored references, once for every data set and reference of these arms."""
        found: dict[str, Job] = {}
        for name in arms:
            arm = self.plan.arms[name]
            reference = self.declared.configs[self.origin(name)].reference.path
            if shared_run(reference) in self.declared.study.scored:
                key = provenance.hash_of([self.corpora[self.origin(name)].hash, reference])
                if key not in found:
                    owner = self.origin(name)
                    found[key] = self._job(
                        jobs.SCORES, f"{name}-{key[:8]}", owner=owner, arm=name, seed=None, overrides=arm.overrides
                    )
        return list(found.values())

    def check_parts(self, arms: Iterable[str]) -> list[Part]:
        """A part for every check of strength 0, its two runs."""
        wanted, parts = {self.origin(arm) for arm in arms}, []
        for check in controls.strength_checks(self.declared):
            if check.arm in wanted:
                seed = self.declared.study.seeds[0]
                pair = [
                    self._job(
                        jobs.CHECKS,
                        f"{check.arm}-{name}",
                        owner=check.arm,
                        arm=check.arm,
                        seed=seed,
                        overrides=overrides,
                    )
                    for name, overrides in (("strength-0", check.at_zero), ("unweighted", check.unweighted))
                ]
                parts.append(Part(f"{jobs.CHECKS}-{check.arm}", tuple(pair)))
        return parts

    def try_parts(self, arms: Iterable[str]) -> list[Part]:
        """A part for every seed of the tries: every setting of every declared arm that these lead to."""
        wanted, study = list(dict.fromkeys(self.origin(arm) for arm in arms)), self.declared.study
        parts = []
        for seed in study.try_seeds:
            found = []
            for arm in wanted:
                for number, setting in enumerate(study.tries):
                    overrides = {**self.declared.arms[arm].overrides, **setting}
                    name = try_name(arm, number, seed)
                    found.append(self._job(jobs.TRIES, name, owner=arm, arm=arm, seed=seed, overrides=overrides))
            parts.append(Part(f"{jobs.TRIES}-{seed}", tuple(found)))
        return parts

    def seed_parts(self, arms: Iterable[str], chosen: Mapping[str, int]) -> list[Part]:
        """A part for every seed: all of these arms, each with the setting that was chosen for it or for what it controls."""
        study, parts = self.declared.study, []
        for seed in study.seeds:
            found = []
            for name in arms:
                setting = study.tries[chosen[self.origin(name)]] if study.tries else {}
                overrides = {**self.plan.arms[name].overrides, **setting}
                owner = self.origin(name)
                found.append(
                    self._job(jobs.RESULTS, f"{name}-{seed}", owner=owner, arm=name, seed=seed, overrides=overrides)
                )
            parts.append(Part(f"seed-{seed}", tuple(found)))
        return parts

    def origin(self, arm: str) -> str:
        """The declared arm that an arm is or controls."""
        return self.plan.arms[arm].control_of or arm

    def _job(
        self, kind: str, name: str, *, owner: str, arm: str, seed: int | None, overrides: Mapping[str, Any]
    ) -> Job:  # fmt: skip
        """A run.

        Args:
          owner: the declared arm or shared run whose corpus and shared runs it has.
        """
        corpus, shared = self.corpora[owner], {}
        config = configuration.with_overrides(self.declared.recipe, overrides, owner=f"{kind}/{name}")
        for run in uses(self.declared, owner):
            shared[run] = provenance.hash_of(configuration.decisive(self.declared.shared[run]))
        own = identity(self.program, configuration.decisive(config), corpus.hash, shared)
        rows = rows_of(corpus)
        operations = sum(own_operations(config, rows, self.declared).values())
        return Job(kind, name, arm, seed, overrides, own, operations, config.train.total_steps(rows.training))


def _plain(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: configuration.plain(value) for key, value in overrides.items()}


def try_name(arm: str, number: int, seed: int) -> str:
    """The run of a try."""
    return f"{arm}-try{number}-{seed}"


def rows_of(corpus: Corpus) -> Rows:
    """What operations depend on."""
    sides = [len(rows) for source in corpus.sources for rows in (source.train, source.validation)]
    return Rows(corpus.tokenizer.vocabulary_size, rows_per_epoch(corpus), sum(sides))


def prepare(declared: Declared) -> Schedule:
    """Opens the corpora, which are made where they are not there yet, and plans the arms.

    Raises:
      UserError: data that can't be had.
    """
    corpora: dict[str, Corpus] = {}
    for name, config in (*declared.shared.items(), *declared.configs.items()):
        corpora[name] = load_data(_with_made_tokenizer(config, corpora))
    plan = controls.plan(declared, {name: rows_of(corpus) for name, corpus in corpora.items()})
    return Schedule(declared, provenance.program_hash(), corpora, plan)


def _with_made_tokenizer(config: Configuration, corpora: Mapping[str, Corpus]) -> Configuration:
    """The configuration of a run whose tokenizer is a shared run's, which may not be there yet, with that of the run's corpus."""
    run = shared_run(config.data.tokenizer)
    if not run and config.data.tokenizer == "bpe":
        run = shared_run(config.pretrained.path)
    if not run:
        return config
    data = dataclasses.replace(config.data, tokenizer=str(corpora[run].directory / "tokenizer"))
    return dataclasses.replace(config, data=data, pretrained=dataclasses.replace(config.pretrained, path=""))
