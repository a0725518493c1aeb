"""Samples of a model for a coding task, their verdicts, and pass@k: made once, gone on with where interrupted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_jax.errors import UserError
from wmtp_jax.evaluation.pass_at_k import mean_pass_at_k
from wmtp_jax.evaluation.results import append, chunks, read_lines, same_settings, write_result
from wmtp_jax.evaluation.tasks import Task, completion_of, scorer_record, verdict
from wmtp_jax.sandbox.judging import OUTPUT_RULE, in_parallel

# Prompts and a seed -> a text and why it ended of each, and sums for the statistics.
Sampler = Callable[[Sequence[str], int], tuple[list[str], list[str], dict[str, float]]]

_CONFIDENCE = 0.95
_AT_ONCE = 64  # samples between two saves


def check_k(ks: Sequence[int], n: int) -> None:
    """Refuses a k that n samples say nothing about.

    Raises:
      UserError: names it.
    """
    for k in ks:
        if not 1 <= k <= n:
            raise UserError(f"--k={k}: pass@k needs 1 <= k <= n, and --n={n} samples are drawn; raise --n or lower --k")


def evaluate_task(
    task: Task,
    sample: Sampler,
    directory: Path,
    *,
    n: int,
    ks: Sequence[int],
    seed: int,
    timeout_seconds: float,
    about: dict[str, Any],
    sampling: dict[str, Any],
    jobs: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Draws what is missing of n samples a problem, judges what is not judged yet, writes the results.

    Args:
      task: problems and prompts.
      sample: draws; the same prompts and seed give the same.
      directory: results go to `directory/TASK` and `directory/TASK.json`.
      n, ks: samples a problem; the k of pass@k, each at most n.
      seed: of the sampling.
      timeout_seconds: of the tests of one sample, or of one input.
      about: what the results say of the model.
      sampling: what the results say of the sampling; decides, with the rest, whether samples that are there belong.
      jobs: sandboxes at once; as many as cores by default.

    Raises:
      UserError: k > n; what is there is of other settings; no sandbox here.
    """
    check_k(ks, n)
    folder = directory / task.name
    settings = {**about, **sampling, "task": task.name, "n": n, "seed": seed, "problems": len(task.problems)}
    settings |= {"timeout_seconds": timeout_seconds, "data_hash": task.data_hash, "prompt_hash": task.prompt_hash}
    if any(problem.inputs for problem in task.problems):
        settings["output_rule"] = OUTPUT_RULE
    same_settings(folder, settings)
    statistics = _draw(task, sample, folder / "samples.jsonl", n=n, seed=seed, say=say)
    verdicts = _judge(task, folder, timeout_seconds=timeout_seconds, jobs=jobs or os.cpu_count() or 1, say=say)

    correct = Counter(entry["task_id"] for entry in verdicts if entry["passed"])
    counts = [(n, correct[problem.name]) for problem in task.problems]
    rates = {str(k): mean_pass_at_k(counts, k, confidence=_CONFIDENCE)._asdict() for k in ks}
    result = {
        **settings,
        "pass_at_k": rates,
        "confidence": _CONFIDENCE,
        "stops": task.stops,
        "first_prompt": task.prompts[0],
        "data": task.files,
        "reasons": dict(Counter(entry["reason"] for entry in verdicts)),
        "results": dict(Counter(entry["result"].partition(":")[0] for entry in verdicts)),
        "statistics": statistics,
    }
    write_result(directory, task.name, result)
    for k, rate in rates.items():
        say(f"{task.name}: pass@{k} {rate['mean']:.3f} ({rate['low']:.3f} to {rate['high']:.3f} at 95%), "
            f"{len(counts)} problems, {n} samples each")  # fmt: skip
    return result


def _draw(
    task: Task, sample: Sampler, path: Path, *, n: int, seed: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Appends the samples that are missing; the sums of what drawing them took."""
    records = [record for record in map(scorer_record, task.problems) if record is not None]
    if records and not (path.parent / "problems.jsonl").exists():
        append(path.parent / "problems.jsonl", records)
    have = len(read_lines(path))
    total: Counter[str] = Counter()
    size = max(1, _AT_ONCE // n)
    for number, part in enumerate(chunks(range(len(task.problems)), size)):
        done = min(max(have - part.start * n, 0), len(part) * n)
        if done == len(part) * n:
            continue
        # The whole part is drawn again where a part of it is there: a sample depends on its place in the call.
        names = [i for i in part for _ in range(n)]
        chunk_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)
        texts, reasons, sums = sample([task.prompts[i] for i in names], chunk_seed)
        total.update(sums)
        entries = [
            {
                "task_id": task.problems[i].name,
                "completion": completion_of(task, text),
                "sample": place % n,
                "reason": reason,
            }
            for place, (i, text, reason) in enumerate(zip(names, texts, reasons, strict=True))
        ]
        append(path, entries[done:])
        say(f"{task.name}: {part.stop} of {len(task.problems)} problems sampled")
    return dict(total)


def _judge(
    task: Task, folder: Path, *, timeout_seconds: float, jobs: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    problems = {problem.name: problem for problem in task.problems}
    samples = read_lines(folder / "samples.jsonl")
    judged = read_lines(folder / "verdicts.jsonl")
    for place, (entry, before) in enumerate(zip(samples, judged, strict=False), start=1):
        if any(before.get(key) != entry[key] for key in ("task_id", "completion")):
            raise UserError(
                f"{folder / 'verdicts.jsonl'}:{place}: is of another sample than in samples.jsonl; remove {folder}"
            )

    def one(entry: dict[str, Any]) -> str:
        return verdict(problems[entry["task_id"]], entry["completion"], timeout_seconds=timeout_seconds)

    waiting, ready = samples[len(judged) :], []
    for entry, said in in_parallel(one, waiting, jobs=jobs):
        ready.append({**entry, "result": said, "passed": said == "passed"})
        if len(ready) >= _AT_ONCE:
            append(folder / "verdicts.jsonl", ready)
            judged, ready = judged + ready, []
            say(f"{task.name}: {len(judged)} of {len(samples)} samples judged")
    append(folder / "verdicts.jsonl", ready)
    return judged + ready
