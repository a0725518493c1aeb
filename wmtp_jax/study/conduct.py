"""A study's runs made: what is refused before, which runs come after which, what is written when."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp_jax.cli import StopSignals
from wmtp_jax.errors import UserError
from wmtp_jax.storage import s3
from wmtp_jax.study import controls, jobs, provenance, results
from wmtp_jax.study.claims import Claims
from wmtp_jax.study.directory import Directory
from wmtp_jax.study.jobs import Job
from wmtp_jax.study.runner import Part, Runner, core_slots
from wmtp_jax.study.schedule import Schedule, try_name
from wmtp_jax.study.watch import Board

# What a study may not change once a run is finished: a verdict is on what was declared before.
_FIXED = ("recipe", "backend", "metric", "baseline", "difference_that_matters", "seeds", "tries", "try_seeds")


def run_study(
    schedule: Schedule, directory: Directory, *, jobs_at_once: int, only: Sequence[str], claims: Claims | None = None
) -> dict[str, Any]:
    """Runs what is missing, and returns the study as it then is.

    Args:
      directory: of the study.
      jobs_at_once: runs beside one another.
      only: arms; none: all.
      claims: of this process.

    Raises:
      UserError: what lies in the directory is another study's, a shared run or a check failed, or what the parts raise.
      Stopped: by a signal; runs were left to save first.
    """
    declared, study = schedule.declared, schedule.declared.study
    arms = list(only) or list(schedule.plan.arms)
    for name in arms:
        if name not in schedule.plan.arms:
            raise UserError(f"--only={name}: no such arm; one of " + ", ".join(schedule.plan.arms))
    slots = core_slots(jobs_at_once)
    record = schedule.record
    check_same(directory, record)
    results.write_study(directory, results.fill(record, directory))
    place = directory.address
    scratch = Path("studies", place.rpartition("/")[2]) if s3.is_remote(place) else Path(place)
    with StopSignals() as signals, Board(declared.name, record["metric"], directory, scratch / "runs") as board:

        def command(job: Job) -> list[str]:
            return jobs.command(
                job,
                recipe=study.recipe,
                backend=study.backend,
                study=declared.name,
                address=directory.address,
                scratch=scratch,
            )

        def after(part: Part) -> None:
            if part.jobs[0].kind == jobs.RESULTS:
                results.write_study(directory, results.fill(record, directory))

        runner = Runner(
            directory,
            scratch,
            command=command,
            backend=study.backend,
            slots=slots,
            claims=claims or Claims(directory),
            signals=signals,
            board=board,
            after=after,
        )

        def run(parts: list[Part]) -> None:
            check_kept(directory, parts)
            board.add(job for part in parts for job in part.jobs)
            runner.run(parts)

        for job in schedule.shared_jobs(arms):
            run([Part(f"{jobs.SHARED_RUNS}-{job.name}", (job,))])
            _check_made(runner, directory, job)
        for job in schedule.score_jobs(arms):
            runner.run([Part(job.output, (job,))])
            if runner.outcomes[job.output] == "failed":
                raise UserError(f"{job.output}: its losses can't be stored; see {scratch}/runs/{job.directory}.log")
        run(schedule.check_parts(arms))
        record["checks"] = check_strengths(directory, schedule.check_parts(arms))
        run(schedule.try_parts(arms))
        chosen = choose(schedule, directory, arms)
        for name, arm in record["arms"].items():
            if schedule.origin(name) in chosen:
                arm["choice"] = chosen[schedule.origin(name)]
        run(schedule.seed_parts(arms, {arm: choice["chosen"] for arm, choice in chosen.items()}))
        filled = results.fill(record, directory)
        results.write_study(directory, filled)
        return filled


def check_same(directory: Directory, record: Mapping[str, Any]) -> None:
    """Refuses a directory with results of another study.

    Raises:
      UserError: names what differs, with both values.
    """
    before = results.read_study(directory)
    if before is None or not any(name.endswith(".json") for name in directory.names(jobs.RESULTS)):
        return
    remedy = "put it back, or name another --workdir"

    def refuse(what: str, was: Any, now: Any) -> None:
        raise UserError(f"{directory.address}: holds results of {what} {was!r}, not {now!r}; {remedy}")

    for field in _FIXED:
        was, now = before[field], record[field]
        if field == "metric":
            was = {name: was[name] for name in now}
        if was != now:
            refuse(field, was, now)
    if before["program"] != record["program"]:
        was = ", ".join(before["commits"]) or before["program"]
        refuse("another version of the program: commit", was, provenance.commit() or record["program"])
    if key := provenance.differing(before["configuration"], record["configuration"]):
        refuse(f"config.{key} =", before["configuration"].get(key), record["configuration"].get(key))
    if key := provenance.differing(before["shared"], record["shared"]):
        refuse(f"shared.{key} =", before["shared"].get(key), record["shared"].get(key))
    for name in {**before["arms"], **record["arms"]}:
        was, now = before["arms"].get(name), record["arms"].get(name)
        if was is None or now is None:
            refuse("the arms", list(before["arms"]), list(record["arms"]))
        for field in ("overrides", "corpus", "baseline"):
            if was[field] != now[field]:
                refuse(f"arms.{name} with {field}", was[field], now[field])


def check_kept(directory: Directory, parts: Iterable[Part]) -> None:
    """Refuses runs that were kept of another program, configuration or corpus.

    Raises:
      UserError: names the first of them.
    """
    kinds = {job.kind for part in parts for job in part.jobs}
    there = {name for kind in kinds for name in directory.names(kind)}
    for job in (job for part in parts for job in part.jobs):
        for file in (jobs.SUMMARY, jobs.FAILED):
            if f"{job.output}/{file}" not in there:
                continue
            content = json.loads(directory.read(f"{job.output}/{file}") or b"{}")
            facts = content.get("study", {})
            for what, now in job.identity.items():
                if facts.get(what) != now:
                    raise UserError(
                        f"{directory.address}/{job.output}: was made with another {what} ({facts.get(what)}, now {now}); remove "
                        "it, put that back, or name another --workdir"
                    )


def _check_made(runner: Runner, directory: Directory, job: Job) -> None:
    if runner.outcomes[job.output] == "failed":
        reason = json.loads(directory.read(f"{job.output}/{jobs.FAILED}") or b"{}")["reason"]
        raise UserError(
            f"{directory.address}/{job.output}: the shared run failed twice, {reason}; mend what it says and remove "
            f"{job.output}/{jobs.FAILED}"
        )


def check_strengths(directory: Directory, parts: Iterable[Part]) -> dict[str, float]:
    """The largest relative difference of any loss in every pair of runs, by arm.

    Raises:
      UserError: one is larger than `controls.CHECK_TOLERANCE`, or a run of a pair failed.
    """
    found = {}
    for part in parts:
        zero, plain = (results.read_run(directory, job.output) for job in part.jobs)
        arm = part.jobs[0].arm
        if zero is None or plain is None:
            raise UserError(f"{directory.address}/{jobs.CHECKS}: the check of arms.{arm} failed; see its log in runs/")
        found[arm] = controls.largest_difference(zero[1], plain[1])
        if not found[arm] <= controls.CHECK_TOLERANCE:
            raise UserError(
                f"arms.{arm}: at strength 0 its losses differ from the unweighted run's by {found[arm]:.1e} relative, more than "
                f"{controls.CHECK_TOLERANCE:.0e}: it differs in more than its weights; controls=False leaves the check out"
            )
    return found


def choose(schedule: Schedule, directory: Directory, arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """For every declared arm that these lead to, the try that is best on validation, and the figures that say so.

    Raises:
      UserError: no try of an arm was finished with all of its seeds.
    """
    study, found = schedule.declared.study, {}
    if not study.tries:
        return {}
    for arm in dict.fromkeys(schedule.origin(arm) for arm in arms):
        table = []
        for number in range(len(study.tries)):
            row = []
            for seed in study.try_seeds:
                kept = results.read_run(directory, f"{jobs.TRIES}/{try_name(arm, number, seed)}")
                row.append(None if kept is None else results.validation_figures(kept[0])[study.metric])
            table.append(row)
        best = results.chosen_try(table, lower_is_better=study.lower_is_better)
        if best is None:
            raise UserError(
                f"{directory.address}/{jobs.TRIES}: no try of arms.{arm} was finished; see their logs in runs/"
            )
        found[arm] = {"chosen": best, "overrides": dict(study.tries[best]), "validation": table}
    return found
